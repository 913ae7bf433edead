"""HiRA: a low-rank pattern that multiplies W entry by entry, so that dW has high rank.

    x ──► W * (1 + B A) ──► y       A [r, in], B [out, r], * entry by entry

dW = W * (B A), of rank up to r rank(W), with A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0, so that
training starts at the base model. There is no scaling. On an embedding A is the table (A = 0,
B ~ N(0, 1)) and only the rows that are looked up are multiplied; on a convolution the pattern
covers the unrolled kernel. A linear builds W + dW at every forward (r + 1 operations an entry of W,
whatever the number of tokens), multiplies once, and keeps it for backward only where it is no
larger than x or y; g^T x costs half of the base's step more.
Paper: Huang et al., HiRA, ICLR 2025. Parameters: r (in + out) a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, Traits, first_input, per_site
from plait.methods._folded import folded_linear, has_plain_weight
from plait.methods._hira_peft import PEFT
from plait.methods._ranges import check_ranges


@dataclass(frozen=True)
class HiraOptions(Options):
    rank: int = 32
    """Rank r of the pattern B A (paper: 32)."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        check_ranges(self, "rank")


class HiraDelta(Delta):
    kinds = frozenset({"linear", "conv", "embedding"})
    traits = Traits(depends_on_base=True)
    options: HiraOptions
    A: Tensor
    B: Tensor

    def build(self) -> None:
        self.parameter("A", self.options.rank, self.site.in_features)
        self.parameter("B", self.site.out_features, self.options.rank)

    def reset(self) -> None:
        if self.site.kind == "embedding":
            self.start("B", "normal")
        else:
            self.start("A", "kaiming_uniform")

    def make(self, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).mul(self.base_weight())

    def pull(self, G: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        G = G * self.base_weight()
        return B.t() @ G, G @ A.t()

    def dense(self) -> Tensor:
        return self.make(self.A, self.B)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.site.kind == "conv":
            return super().forward(x, y)
        if self.site.kind == "embedding":
            pattern = self.site.apply_low_rank(x, self.A, self.B)
            return F.embedding(x, self.site.weight().t()) * pattern
        return folded_linear(F.dropout(x, self.dropout), self, (self.A, self.B))

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        if self.site.kind != "linear" or self.dropout or not has_plain_weight(self.site):
            return super().adapt(*args, **kwargs)
        x = first_input(args, kwargs)
        return folded_linear(x, self, (self.A, self.B), self.site.weight(), self.site.bias())


METHOD = Method(
    name="hira",
    title="HiRA: Hadamard high-rank adaptation",
    paper="Huang et al., ICLR 2025",
    axis="parameterisation",
    options=HiraOptions,
    delta=HiraDelta,
    count=per_site(lambda site, o: o.rank * (site.in_features + site.out_features)),
    peft=PEFT,
)
