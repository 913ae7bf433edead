"""LoHa: dW is the elementwise product of two low-rank matrices, of rank up to r^2.

    dW = s (w1_a w1_b) * (w2_a w2_b)      w_a [out, r], w_b [r, in], s = alpha / r

w2_b = 0 at the start. Since (a b^T) * (c d^T) = (a * c)(b * d)^T, dW is also a product B A of inner
size r^2, B's columns and A's rows being the elementwise products of all pairs. Where 6 r^2 is at
most the shorter side that is the cheaper way, and the site rides LoRA's kernel at rank r^2 without
any [out, in] tensor. Wider, dW is formed (2 r out in multiplications) and added to W for a single
product; a step then takes three products of W's size, LoRA's two, and keeps none of it. `tucker`
keeps a convolution's kernel in a core of its own and always forms dW.
Paper: Yeh et al., 2023, arXiv 2309.14859, after FedPara, arXiv 2108.06098.
Parameters: 2 r (in + out) a site; on a convolution in counts the kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, Site, Traits, first_input, per_site
from plait.linalg import LowRank
from plait.methods._folded import folded_linear, has_plain_weight
from plait.methods._lycoris_peft import lycoris_codec
from plait.methods._ranges import check_ranges
from plait.methods._tucker import has_core, tucker_product

NAMES = ("w1_a", "w1_b", "w2_a", "w2_b")


@dataclass(frozen=True)
class LohaOptions(Options):
    rank: int = 8
    """Rank r of either matrix (paper: 4 to 16); dW has rank r^2."""
    alpha: float | None = None
    """Numerator of the scaling alpha / r; None means r, a scaling of 1."""
    tucker: bool = False
    """On kernels larger than 1 x 1: either matrix from maps w_a [r, out], w_b [r, channels] and a
    core t [r, r, k, k]."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        check_ranges(self, "rank")

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The parameters at a site."""
        r, (rows, columns) = self.rank, site.shape
        if not (self.tucker and has_core(site)):
            return {name: (rows, r) if name.endswith("a") else (r, columns) for name in NAMES}
        channels, *kernel = site.details["kernel"]
        maps = {name: (r, rows if name.endswith("a") else channels) for name in NAMES}
        return {"t1": (r, r, *kernel), "t2": (r, r, *kernel), **maps}


class LohaDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True)
    options: LohaOptions

    def build(self) -> None:
        for name, shape in self.options.shapes(self.site).items():
            self.parameter(name, *shape)
        if "t1" in self._parameters or 6 * self.options.rank**2 > min(self.site.shape):
            self.traits = Traits()

    def reset(self) -> None:
        for name in self._parameters:
            if name != "w2_b":
                self.start(name, "kaiming_uniform")

    def _matrices(self) -> tuple[Tensor, ...]:
        return tuple(self.get_parameter(name) for name in NAMES)

    def factors(self) -> LowRank | None:
        """The products of all pairs: B [out, r^2], A [r^2, in]."""
        if "t1" in self._parameters or self.options.rank**2 >= min(self.site.shape):
            return None
        w1_a, w1_b, w2_a, w2_b = self._matrices()
        B = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
        A = (w1_b[:, None] * w2_b).flatten(0, 1)
        return LowRank(B=B, A=A, scale=self.options.scaling)

    def make(self, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
        return (w1_a @ w1_b) * (w2_a @ w2_b) * self.options.scaling

    def pull(
        self, G: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor
    ) -> tuple[Tensor, ...]:
        G = G * self.options.scaling
        first, second = G * (w2_a @ w2_b), G * (w1_a @ w1_b)
        return first @ w1_b.t(), w1_a.t() @ first, second @ w2_b.t(), w2_a.t() @ second

    def dense(self) -> Tensor:
        if "t1" not in self._parameters:
            return self.make(*self._matrices())
        w1_a, w1_b, w2_a, w2_b = self._matrices()
        t1, t2 = self.get_parameter("t1"), self.get_parameter("t2")
        first, second = tucker_product(t1, w1_a, w1_b), tucker_product(t2, w2_a, w2_b)
        return first * second * self.options.scaling

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        if self.dropout or self.site.kind == "conv" or not has_plain_weight(self.site):
            return super().adapt(*args, **kwargs)
        x = first_input(args, kwargs)
        return folded_linear(x, self, self._matrices(), self.site.weight(), self.site.bias())

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.site.kind == "conv" or self.traits.low_rank:
            return super().forward(x)
        return folded_linear(F.dropout(x, self.dropout), self, self._matrices())


METHOD = Method(
    name="loha",
    title="LoHa: Hadamard-product adapters",
    paper="Yeh et al., 2023, arXiv 2309.14859",
    axis="parameterisation",
    options=LohaOptions,
    delta=LohaDelta,
    count=per_site(lambda site, o: sum(math.prod(shape) for shape in o.shapes(site).values())),
    peft=lycoris_codec("LOHA", {name: f"hada_{name}" for name in (*NAMES, "t1", "t2")}),
)
