"""Compacter: a residual bottleneck whose matrices are sums of Kronecker products with shared rules.

    block ──► h ──┬─────────────────────────────────────────────────────────► + ──► h'
                  └──► W_down (d x k) + b ──► gelu ──► W_up (k x d) + b ──────┘

W = sum_i C_i kron (s_i t_i), i = 1 .. n: the rules C [n, n, n] are one tensor for the whole model,
s_i [in/n, rho] and t_i [rho, out/n] belong to one matrix. C starts at N(0, 0.01^2), s and t
Glorot-uniform, biases zero: nearly, not exactly the base model; `start="zero"` begins with t_up = 0
and so exactly there. The change is not linear, so it can be neither fused nor exported as a LoRA.
On feed-forward blocks this is Compacter++; name the attention blocks too for Compacter. The paper
also trains the layer norms (`train_modules=`).
Paper: Karimi Mahabadi et al., 2021, arXiv 2106.04647.
Parameters: n^3 once, and 2 rho (d + k) + d + k a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, SharedTensors, Site, Traits
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.methods._kronecker import kron_dense
from plait.methods._ranges import check_ranges

RULE_SIZE = 0.01


@dataclass(frozen=True)
class CompacterOptions(Options):
    n: int = 4
    """Rules, and Kronecker terms of a matrix (paper: 4, 8 and 12); must divide the width d."""
    reduction: int = 32
    """d / k; the bottleneck k is rounded down to a multiple of n, and is at least n."""
    rank: int = 1
    """Rank rho of s_i t_i (paper: 1)."""
    start: Literal["paper", "zero"] = "paper"
    """Begin near the base model, as the paper does, or exactly at it."""

    def __post_init__(self) -> None:
        check_choices(self, "compacter")
        check_ranges(self, "n", "reduction", "rank")

    def bottleneck(self, site: Site) -> int:
        """k at a site."""
        if site.out_features % self.n:
            raise PlaitError(
                f"n={self.n} does not divide the width {site.out_features} of {site.path!r}."
            )
        return max(site.out_features // self.reduction // self.n, 1) * self.n


class CompacterDelta(Delta):
    kinds = frozenset({"module"})
    traits = Traits(linear_in_x=False, zero_start=False)
    options: CompacterOptions

    @classmethod
    def prepare(
        cls, sites: Sequence[Site], options: CompacterOptions, shared: SharedTensors
    ) -> None:
        shared.pool("rules", (options.n,) * 3, start="normal")
        shared["rules"].data.mul_(RULE_SIZE)

    def build(self) -> None:
        n, rank = self.options.n, self.options.rank
        if n != len(self.shared["rules"]):
            raise PlaitError(
                f"overrides at {self.site.path!r} may not change n, because the rules are shared "
                "by the whole model."
            )
        if self.options.start == "zero":
            self.traits = Traits(linear_in_x=False)
        width, inner = self.site.out_features, self.options.bottleneck(self.site)
        for name, rows, columns in (("down", width, inner), ("up", inner, width)):
            self.parameter(f"s_{name}", n, rows // n, rank)
            self.parameter(f"t_{name}", n, rank, columns // n)
            self.parameter(f"b_{name}", columns)

    def reset(self) -> None:
        last = "t_up" if self.options.start == "zero" else ""
        for name in ("s_down", "t_down", "s_up", "t_up"):
            if name != last:
                self.start(name, "xavier_uniform")

    def weight(self, name: str) -> Tensor:
        """W_down [d, k] or W_up [k, d], summed in the adapter's own dtype."""
        s, t = self.get_parameter(f"s_{name}"), self.get_parameter(f"t_{name}")
        return kron_dense(self.shared["rules"], s @ t)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The bottleneck's output for a block's output x [..., d]."""
        down, up = (self.weight(name).t().to(x.dtype) for name in ("down", "up"))
        b_down, b_up = (self.get_parameter(f"b_{name}").to(x.dtype) for name in ("down", "up"))
        return F.linear(F.gelu(F.linear(x, down, b_down), approximate="tanh"), up, b_up)


def _count(sites: Sequence[Site], o: CompacterOptions) -> int:
    sums = [site.out_features + o.bottleneck(site) for site in sites]
    return (o.n**3 if sums else 0) + sum(2 * o.rank * total + total for total in sums)


METHOD = Method(
    name="compacter",
    title="Compacter: low-rank hypercomplex adapter layers",
    paper="Karimi Mahabadi et al., 2021, arXiv 2106.04647",
    axis="parameterisation",
    options=CompacterOptions,
    delta=CompacterDelta,
    count=_count,
    targets="ffn",
    example={"n": 4, "reduction": 2},
)
