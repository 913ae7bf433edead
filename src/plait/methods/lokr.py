"""LoKr: dW is the Kronecker product of a small matrix and a large one, itself perhaps low-rank.

    x ──► read as i1 x i2 ──► * w2^T (o2 x i2) ──► w1 (o1 x i1) * ──► read as o1 o2 ──► + W x

dW = s (w1 kron w2), out = o1 o2 and in = i1 i2 cut near their square roots (or by `factor`, the
smaller number first), s = alpha / r. w2 = w2_a w2_b of rank r where r < max(o2, i2) / 2, and with
`decompose_both` w1 likewise; on a convolution w2 holds the kernel. w1 = 0 at the start.
rank(dW) = rank(w1) rank(w2), so a few thousand numbers can have full rank. A linear site multiplies
with the two factors and never forms dW; a convolution forms it, or uses its low-rank factors.
Paper: Yeh et al., 2023, arXiv 2309.14859. Parameters: o1 i1 + o2 i2 a site, r (o2 + i2) or so where
a factor is low-rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, Site, first_input, per_site
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.methods._kronecker import kron_add, kron_apply, kron_dense
from plait.methods._lokr_peft import LOKR_CODEC
from plait.methods._modes import near_factors


@dataclass(frozen=True)
class LokrOptions(Options):
    rank: int = 8
    """Rank r of w2; a large one (10000) makes w2 full."""
    alpha: float | None = None
    """Numerator of the scaling alpha / r; None means r, a scaling of 1."""
    factor: int = -1
    """Where to cut the sides: -1 near the square root, else the size of w1 (paper: 4 to 16)."""
    decompose_both: bool = False
    """Also make w1 low-rank where r < max(o1, i1) / 2."""
    zero: Literal["w1", "w2"] = "w1"
    """Which factor starts at zero (LyCORIS's own code: w2)."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        check_choices(self, "lokr")
        if self.rank < 1 or self.factor == 0 or self.factor < -1:
            raise PlaitError(
                f"rank ({self.rank}) must be at least 1 and factor ({self.factor}) -1 or positive."
            )
        if not 0 <= self.dropout < 1:
            raise PlaitError(f"dropout must lie in [0, 1), not {self.dropout}.")

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def shapes(self, site: Site) -> dict[str, tuple[int, int]]:
        """The parameters at a site; a kernel is unrolled into the columns of w2."""
        channels = site.details["kernel"][0] if site.kind == "conv" else site.in_features
        (o1, o2), (i1, i2) = (near_factors(n, self.factor) for n in (site.out_features, channels))
        r, columns = self.rank, i2 * (site.in_features // channels)
        first, second = {"w1": (o1, i1)}, {"w2": (o2, columns)}
        if self.decompose_both and r < max(o1, i1) / 2:
            first = {"w1_a": (o1, r), "w1_b": (r, i1)}
        if r < max(o2, i2) / 2:
            second = {"w2_a": (o2, r), "w2_b": (r, columns)}
        return first | second


class LokrDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    options: LokrOptions

    def build(self) -> None:
        for name, shape in self.options.shapes(self.site).items():
            self.parameter(name, *shape)

    def reset(self) -> None:
        # Of a product the last factor of w2 or the first of w1 is the zero one.
        zero = {"w1": ("w1", "w1_a"), "w2": ("w2", "w2_b")}[self.options.zero]
        for name in self._parameters:
            if name not in zero:
                self.start(name, "kaiming_uniform")

    def _pair(self, name: str) -> tuple[Tensor, Tensor | None]:
        """(w, None), or (w_a, w_b) of a factor that is a product."""
        whole = self._parameters.get(name)
        if whole is not None:
            return whole, None
        return self.get_parameter(f"{name}_a"), self.get_parameter(f"{name}_b")

    def _whole(self, name: str) -> Tensor:
        first, second = self._pair(name)
        return first if second is None else first @ second

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        if self.site.kind == "conv":
            return super().adapt(*args, **kwargs)
        x = first_input(args, kwargs)
        y = self.site.forward(*args, **kwargs)
        return kron_add(y, *self._operands(x), self.options.scaling)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.site.kind == "conv":
            return super().forward(x)
        return kron_apply(*self._operands(x), self.options.scaling)

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, w1 and w2, or with a low-rank w2 its second factor already applied to x."""
        x = F.dropout(x, self.dropout) if self.dropout else x
        first, second = self._pair("w2")
        if second is not None:
            x = F.linear(x.unflatten(-1, (-1, second.shape[1])), second.to(x.dtype)).flatten(-2)
        return x, self._whole("w1")[None], first[None]

    def dense(self) -> Tensor:
        return self.options.scaling * kron_dense(self._whole("w1")[None], self._whole("w2")[None])

    def factors(self) -> LowRank | None:
        """(w1_a kron w2_a)(w1_b kron w2_b), for export, where its rank is below W's own."""
        (w1_a, w1_b), (w2_a, w2_b) = self._pair("w1"), self._pair("w2")
        if w2_b is None or w1_a.shape[1] * len(w2_b) >= min(self.site.shape):
            return None
        w1_b = torch.eye(w1_a.shape[1]).to(w1_a) if w1_b is None else w1_b
        B, A = torch.kron(w1_a, w2_a), torch.kron(w1_b, w2_b)
        return LowRank(B=B, A=A, scale=self.options.scaling)


def _count(site: Site, o: LokrOptions) -> int:
    return sum(math.prod(shape) for shape in o.shapes(site).values())


METHOD = Method(
    name="lokr",
    title="LoKr: Kronecker-product adapters",
    paper="Yeh et al., 2023, arXiv 2309.14859",
    axis="parameterisation",
    options=LokrOptions,
    delta=LokrDelta,
    count=per_site(_count),
    peft=LOKR_CODEC,
)
