"""Weighted sums whose weights follow from inner products, of whole changes or line by line.

Whatever bends between models (arcs, means on the sphere, averages that depend on angles) stays in
the span of the changes, so a k x k Gram matrix <dW_i, dW_j> says it all. Taken row by row (an
output's weights) or column by column (an input's), the merge is sum_i diag(c_i) dW_i or
sum_i dW_i diag(c_i): in factors a scaling of B_i's rows or A_i's columns, exact and of the rank of
the inputs' sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter.choices import check_choices
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import Merge


@dataclass
class LineMerge(Merge):
    """Subclasses say `coefficients`."""

    along: Literal["whole", "rows", "columns"] = "whole"
    """Bend each change as one vector, or each of its rows (outputs) or columns (inputs)."""

    spaces = ("factors", "delta")

    def __post_init__(self) -> None:
        check_choices(self, type(self).__name__.lower())

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        """The factors [n, k] of the changes at n lines, from inner products [n, k, k], float64."""
        raise NotImplementedError

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        w = torch.tensor(list(weights), dtype=torch.float64)
        if self.along == "whole":
            gram = torch.stack([torch.stack([a.inner(b).double() for b in lows]) for a in lows])
            return LowRank.weighted_sum(lows, self.coefficients(gram[None], w)[0].tolist())
        if self.along == "columns":
            turned = [low.transpose() for low in lows]
            return _by_rows(turned, self.coefficients(row_grams(turned), w)).transpose()
        return _by_rows(lows, self.coefficients(row_grams(lows), w))

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        """Coefficients [n, k] of the whole or of the columns; rows find their own."""
        if self.along == "rows":
            return None
        lines = 1 if self.along == "whole" else changes.shape[1]
        gram = torch.zeros(lines, changes.k, changes.k, dtype=torch.float64)
        for block in changes.blocks():
            wide = block.double()
            if self.along == "whole":
                gram[0] += wide.flatten(1) @ wide.flatten(1).mT
            else:
                columns = wide.permute(2, 0, 1)
                gram += columns @ columns.mT
        return self.coefficients(gram, weights.flatten().double())

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        if found is None:
            wide = block.double().transpose(0, 1)
            own = self.coefficients(wide @ wide.mT, weights.flatten().double())
            return (own.mT[:, :, None].to(block.dtype) * block).sum(0)
        return (found.mT[:, None, :].to(block.dtype) * block).sum(0)


def row_grams(lows: Sequence[LowRank]) -> Tensor:
    """<row a of dW_i, row a of dW_j>, [out, k, k] in float64, without any row multiplied out."""
    k, out = len(lows), lows[0].shape[-2]
    gram = torch.zeros(out, k, k, dtype=torch.float64)
    sides = [(low.B.double() * low.scale, low.A.double()) for low in lows]
    for i, (B, A) in enumerate(sides):
        for j in range(i, k):
            other, right = sides[j]
            gram[:, i, j] = gram[:, j, i] = ((B @ (A @ right.mT)) * other).sum(-1)
    return gram


def _by_rows(lows: Sequence[LowRank], factors: Tensor) -> LowRank:
    """sum_i diag(factors[:, i]) dW_i."""
    scaled = [
        LowRank(low.B * factors[:, i : i + 1].to(low.dtype), low.A, low.scale)
        for i, low in enumerate(lows)
    ]
    return LowRank.weighted_sum(scaled, [1.0] * len(scaled))


def cosines(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines [n, k, k] (0 with a change that is 0 there) and norms [n, k] of inner products."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    lengths = norms[:, :, None] * norms[:, None, :]
    return torch.where(lengths > 0, gram / torch.where(lengths > 0, lengths, 1), 0), norms
