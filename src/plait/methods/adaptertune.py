"""AdapterTune: a residual bottleneck after each block, silent at the start.

    block ──► x ──┬──────────────────────────────────────────────► + ──► x'
                  └──► D (r x d) + b_d ──► gelu ──► U (d x r) + b_u ──► * alpha ──┘

U and b_u start at zero, so that the network is the pretrained one, and only they have a gradient in
the first step; `start="small"` draws them from N(0, 0.0001^2), the paper's ablation. The bottleneck
is not linear, so it can be neither fused nor exported as a LoRA. The paper's `adapter_every` is
`layers=range(0, n, 2)` of `plait.attach`.
Paper: Khazem, 2026, arXiv 2603.14706. Parameters: 2 r d + r + d a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, Site, Traits, per_site
from plait.errors import PlaitError

SMALL = 1e-4


@dataclass(frozen=True)
class AdapterTuneOptions(Options):
    rank: int = 16
    """Width r of the bottleneck (paper: 16; 4 to 64 in its sweep, with an elbow)."""
    alpha: float = 1.0
    """Factor on the bottleneck's output (paper: 1)."""
    start: Literal["zero", "small"] = "zero"
    """Whether U and b_u start at zero, or at N(0, 0.0001^2)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise PlaitError(f"rank must be at least 1, not {self.rank}.")
        if self.start not in ("zero", "small"):
            raise PlaitError(f"start must be 'zero' or 'small', not {self.start!r}.")


class AdapterTuneDelta(Delta):
    kinds = frozenset({"module"})
    traits = Traits(linear_in_x=False)
    options: AdapterTuneOptions
    D: Tensor
    b_d: Tensor
    U: Tensor
    b_u: Tensor

    def build(self) -> None:
        if self.options.start == "small":
            self.traits = Traits(linear_in_x=False, zero_start=False)
        width, r = self.site.out_features, self.options.rank
        self.parameter("D", r, width)
        self.parameter("b_d", r)
        self.parameter("U", width, r)
        self.parameter("b_u", width)

    def reset(self) -> None:
        self.start("D", "xavier_uniform")
        if self.options.start == "small":
            for name in ("U", "b_u"):
                self.start(name, "normal")
                self.get_parameter(name).mul_(SMALL)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """alpha (U gelu(D x + b_d) + b_u) for a block's output x [..., d]."""
        hidden = F.gelu(F.linear(x, self.D.to(x.dtype), self.b_d.to(x.dtype)))
        alpha = self.options.alpha
        return F.linear(hidden, (alpha * self.U).to(x.dtype), (alpha * self.b_u).to(x.dtype))


def _count(site: Site, o: AdapterTuneOptions) -> int:
    return 2 * o.rank * site.out_features + o.rank + site.out_features


METHOD = Method(
    name="adaptertune",
    title="AdapterTune: zero-initialised residual bottlenecks",
    paper="Khazem, 2026, arXiv 2603.14706",
    axis="parameterisation",
    options=AdapterTuneOptions,
    delta=AdapterTuneDelta,
    count=per_site(_count),
    targets="blocks",
    example={"rank": 8},
)
