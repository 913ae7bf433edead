"""GraLoRA: a LoRA of its own for every block of a k x k grid over W, at no more cost than one.

    x_n (in/k features) ──► A_n (r wide), cut into k pieces ──► piece j goes to output block j
    the k pieces that reached block j ──► B_j ──► * s ──► + (W x)_j

dW block (j, n) = s B_jn A_jn of rank r / k, where A_jn is piece j of A_n and B_jn rows n of B_j; dW
has rank up to k r. One outlier feature of x then moves only the pieces of its own block. A starts
at U(-sqrt(k/in), sqrt(k/in)), B at zero. `hybrid_rank` adds a plain LoRA over all of W. s = alpha /
(r + hybrid_rank). k must divide r and both sides of W.
Paper: Jung et al., 2025, arXiv 2505.20355. Parameters: (r + hybrid_rank)(in + out) a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plait import kernels
from plait.adapter import Delta, Method, Options, first_input, per_site
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.methods._folded import has_plain_weight
from plait.methods._gralora_peft import GRALORA_CODEC
from plait.methods._granular import granular_add, granular_linear
from plait.methods._ranges import check_ranges


@dataclass(frozen=True)
class GraloraOptions(Options):
    rank: int = 32
    """Width r of a block's A; counts parameters as LoRA's rank does."""
    k: int = 2
    """Blocks a side (paper: 2 up to rank 32, 4 from 64)."""
    hybrid_rank: int = 0
    """Rank of a LoRA over all of W beside the grid (paper: for ranks of 16 and less)."""
    alpha: float | None = None
    """Numerator of the scaling alpha / (r + hybrid_rank); None means a scaling of 2."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        check_ranges(self, "k", "rank")
        if self.rank % self.k or self.hybrid_rank < 0:
            raise PlaitError(
                f"k={self.k} must divide rank={self.rank}, and hybrid_rank={self.hybrid_rank} must "
                "be at least 0."
            )

    @property
    def scaling(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / (self.rank + self.hybrid_rank)


class GraloraDelta(Delta):
    options: GraloraOptions
    A: Tensor
    B: Tensor

    def build(self) -> None:
        k, r, (rows, columns) = self.options.k, self.options.rank, self.site.shape
        if rows % k or columns % k:
            raise PlaitError(f"k={k} does not divide {rows} x {columns} at {self.site.path!r}.")
        self.parameter("A", k, columns // k, r)
        self.parameter("B", k, r, rows // k)
        if self.options.hybrid_rank:
            self.parameter("A_all", self.options.hybrid_rank, columns)
            self.parameter("B_all", rows, self.options.hybrid_rank)

    def reset(self) -> None:
        self.start("A", "uniform")
        self.A.div_(self.A.shape[1] ** 0.5)
        if self.options.hybrid_rank:
            self.start("A_all", "kaiming_uniform")

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        x = first_input(args, kwargs)
        if self.dropout or not has_plain_weight(self.site):
            return self._add(self.site.forward(*args, **kwargs), x)
        weight, bias = self.site.weight(), self.site.bias()
        y = granular_linear(x, weight, bias, self.A, self.B, self.options.scaling)
        return self._add_hybrid(y, x)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self._add(x.new_zeros(*x.shape[:-1], self.site.out_features), x)

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout) if self.dropout else x
        return self._add_hybrid(granular_add(y, x, self.A, self.B, self.options.scaling), x)

    def _add_hybrid(self, y: Tensor, x: Tensor) -> Tensor:
        if not self.options.hybrid_rank:
            return y
        A, B = self.get_parameter("A_all"), self.get_parameter("B_all")
        return kernels.lora_add(y, x, A, B, self.options.scaling)

    def factors(self) -> LowRank | None:
        """Both products as block-diagonal matrices, of inner size k r, for export."""
        k, _, r = self.A.shape
        pieces = self.A.mT.unflatten(1, (k, r // k))  # [n, j, r/k, in/k]
        A = torch.cat([torch.block_diag(*pieces[:, j]) for j in range(k)])
        B = torch.block_diag(*self.B.mT)
        if self.options.hybrid_rank:
            A = torch.cat([A, self.get_parameter("A_all")])
            B = torch.cat([B, self.get_parameter("B_all")], dim=1)
        return LowRank(B=B, A=A, scale=self.options.scaling)


METHOD = Method(
    name="gralora",
    title="GraLoRA: granular low-rank adaptation",
    paper="Jung et al., 2025, arXiv 2505.20355",
    axis="parameterisation",
    options=GraloraOptions,
    delta=GraloraDelta,
    count=per_site(lambda s, o: (o.rank + o.hybrid_rank) * (s.in_features + s.out_features)),
    peft=GRALORA_CODEC,
    example={"rank": 4, "k": 2, "hybrid_rank": 1},
)
