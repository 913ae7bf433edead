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
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, PeftCodec, Site, Traits, per_site
from plait.adapter.site import base_class
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.methods._hadamard import Factors, hadamard, hadamard_linear
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

    def matrices(self) -> Factors:
        return cast(Factors, tuple(self.get_parameter(name) for name in NAMES))

    def factors(self) -> LowRank | None:
        """The products of all pairs: B [out, r^2], A [r^2, in]."""
        if self.options.rank**2 >= min(self.site.shape):
            return None
        w1_a, w1_b, w2_a, w2_b = self.matrices()
        B = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
        A = (w1_b[:, None] * w2_b).flatten(0, 1)
        return LowRank(B=B, A=A, scale=self.options.scaling)

    def dense(self) -> Tensor:
        return hadamard(self.matrices(), self.options.scaling)

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        if self.dropout or self.site.kind == "conv" or not _adds_exactly(self.site, x):
            return super().adapt(*args, **kwargs)
        weight, bias = self.site.weight(), self.site.bias()
        return hadamard_linear(x, weight, bias, self.matrices(), self.options.scaling)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.site.kind == "conv" or self.traits.low_rank:
            return super().forward(x)
        x = F.dropout(x, self.dropout) if self.dropout else x
        return hadamard_linear(x, None, None, self.matrices(), self.options.scaling)


def _adds_exactly(site: Site, x: Tensor) -> bool:
    """Whether W + dW keeps dW's digits: half precision would round them away."""
    plain = base_class(site.base).forward is nn.Linear.forward
    wide = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(
        x.device.type
    )
    return plain and wide and site.weight().dtype == x.dtype


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
        required={"use_effective_conv2d": False},
        settings=SETTINGS,
    ),
)
