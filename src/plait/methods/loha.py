"""LoHa: dW is the elementwise product of two low-rank matrices, of rank up to r^2.

    dW = s (w1_a w1_b) * (w2_a w2_b)      w_a [out, r], w_b [r, in], s = alpha / r

w2_b = 0 at the start. Since (a b^T) * (c d^T) = (a * c)(b * d)^T, dW is also a product B A of inner
size r^2, B's columns and A's rows being the elementwise products of all pairs. Where 6 r^2 is at
most the shorter side that is the cheaper way, and the site rides LoRA's kernel at rank r^2 without
any [out, in] tensor. Wider, dW is formed (2 r out in multiplications) and added to W for a single
product; a step then takes three products of W's size, LoRA's two, and keeps none of it.
Paper: Yeh et al., 2023, arXiv 2309.14859, after FedPara, arXiv 2108.06098.
Parameters: 2 r (in + out) a site; on a convolution in counts the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, PeftCodec, Traits, per_site
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.methods._folded import folded_linear, has_plain_weight
from plait.methods._lycoris_peft import (
    SETTINGS,
    lycoris_config,
    partial_reader,
    partial_writer,
    rank_and_alpha,
)

NAMES = ("w1_a", "w1_b", "w2_a", "w2_b")
KEYS: Mapping[str, str] = {name: f"hada_{name}" for name in NAMES}


@dataclass(frozen=True)
class LohaOptions(Options):
    rank: int = 8
    """Rank r of either matrix (paper: 4 to 16); dW has rank r^2."""
    alpha: float | None = None
    """Numerator of the scaling alpha / r; None means r, a scaling of 1."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise PlaitError(f"rank must be at least 1, not {self.rank}.")
        if not 0 <= self.dropout < 1:
            raise PlaitError(f"dropout must lie in [0, 1), not {self.dropout}.")

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LohaDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True)
    options: LohaOptions

    def build(self) -> None:
        r, (rows, columns) = self.options.rank, self.site.shape
        if 6 * r * r > min(rows, columns):
            self.traits = Traits()
        for name in NAMES:
            self.parameter(name, *((rows, r) if name.endswith("a") else (r, columns)))

    def reset(self) -> None:
        for name in NAMES[:3]:
            self.start(name, "kaiming_uniform")

    def _matrices(self) -> tuple[Tensor, ...]:
        return tuple(self.get_parameter(name) for name in NAMES)

    def factors(self) -> LowRank | None:
        """The products of all pairs: B [out, r^2], A [r^2, in]."""
        if self.options.rank**2 >= min(self.site.shape):
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
        return self.make(*self._matrices())

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        if self.dropout or self.site.kind == "conv" or not has_plain_weight(self.site):
            return super().adapt(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
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
    count=per_site(lambda site, o: 2 * o.rank * (site.in_features + site.out_features)),
    peft=PeftCodec(
        type="LOHA",
        keys=KEYS,
        options=rank_and_alpha,
        config=lycoris_config,
        read=partial_reader(KEYS),
        write=partial_writer(KEYS),
        settings=SETTINGS,
    ),
)
