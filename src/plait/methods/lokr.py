"""LoKr: dW is the Kronecker product of a small matrix and a large one, itself perhaps low-rank.

    x ──► read as i1 x i2 ──► * w2^T (o2 x i2) ──► w1 (o1 x i1) * ──► read as o1 o2 ──► + W x

dW = s (w1 kron w2), out = o1 o2 and in = i1 i2 cut near their square roots (or by `factor`, the
smaller number first), s = alpha / r. w2 = w2_a w2_b of rank r where r < max(o2, i2) / 2, and with
`decompose_both` w1 likewise; on a convolution w2 holds the kernel, in its columns or in a core t2.
w1 = 0 at the start. rank(dW) = rank(w1) rank(w2): a few thousand numbers can have full rank. A
linear site multiplies with the two factors and never forms dW; a convolution forms it, or uses its
low-rank factors.
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

from plait.adapter import Delta, Method, Options, first_input, per_site
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.methods._kronecker import kron_add, kron_apply, kron_dense
from plait.methods._lokr_parts import lokr_shapes, whole_factor
from plait.methods._lokr_peft import LOKR_CODEC
from plait.methods._ranges import check_ranges


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
    tucker: bool = False
    """On kernels above 1 x 1: a low-rank w2 from w2_a [r, o2], w2_b [r, i2] and t2 [r, r, k, k]."""
    zero: Literal["w1", "w2"] = "w1"
    """Which factor starts at zero (LyCORIS's own code: w2)."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        check_choices(self, "lokr")
        check_ranges(self, "rank")
        if self.factor == 0 or self.factor < -1:
            raise PlaitError(f"factor must be -1 or positive, not {self.factor}.")

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LokrDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    options: LokrOptions

    def build(self) -> None:
        for name, shape in lokr_shapes(self.site, self.options).items():
            self.parameter(name, *shape)

    def reset(self) -> None:
        # Of a product the last factor of w2 or the first of w1 is the zero one.
        zero = {"w1": ("w1", "w1_a"), "w2": ("w2", "w2_b")}[self.options.zero]
        for name in self._parameters:
            if name not in zero:
                self.start(name, "kaiming_uniform")

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
        parts = self._parameters
        w1, w2_b = whole_factor(parts, "w1")[None], parts.get("w2_b")
        if w2_b is None:
            return x, w1, self.get_parameter("w2")[None]
        x = F.linear(x.unflatten(-1, (-1, w2_b.shape[1])), w2_b.to(x.dtype)).flatten(-2)
        return x, w1, self.get_parameter("w2_a")[None]

    def dense(self) -> Tensor:
        w1, w2 = (whole_factor(self._parameters, name)[None] for name in ("w1", "w2"))
        return self.options.scaling * kron_dense(w1, w2)

    def factors(self) -> LowRank | None:
        """(w1_a kron w2_a)(w1_b kron w2_b), for export, where its rank is below W's own."""
        parts = self._parameters
        if "w2_b" not in parts or "t2" in parts:
            return None
        w2_a, w2_b = self.get_parameter("w2_a"), self.get_parameter("w2_b")
        w1_a: Tensor = self.get_parameter("w1" if "w1" in parts else "w1_a")
        if w1_a.shape[1] * len(w2_b) >= min(self.site.shape):
            return None
        w1_b = torch.eye(w1_a.shape[1]).to(w1_a) if "w1" in parts else self.get_parameter("w1_b")
        B, A = torch.kron(w1_a, w2_a), torch.kron(w1_b, w2_b)
        return LowRank(B=B, A=A, scale=self.options.scaling)


METHOD = Method(
    name="lokr",
    title="LoKr: Kronecker-product adapters",
    paper="Yeh et al., 2023, arXiv 2309.14859",
    axis="parameterisation",
    options=LokrOptions,
    delta=LokrDelta,
    count=per_site(lambda s, o: sum(math.prod(v) for v in lokr_shapes(s, o).values())),
    peft=LOKR_CODEC,
)
