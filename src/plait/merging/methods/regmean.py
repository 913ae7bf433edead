"""RegMean: the merge whose outputs are nearest to each input's own, on that input's data.

    min over dW of  sum_i w_i |X_i (dW - dW_i)^T|^2      G_i = X_i^T X_i / tokens  [in, in]
    dW = sum_i dW_i (w_i G_i) S^-1,   S = sum_j w_j G_j + ridge
       = [s_1 B_1 | ... | s_k B_k] [A_1 M_1; ...; A_k M_k],   M_i = (w_i G_i) S^-1

The closed form acts on inputs alone, so the Bs stay and the As are solved for: exact at rank
sum r_i, nothing of W's size is formed, and one Cholesky factorisation a site is the whole cost.
Off-diagonal entries of each G_i are shrunk by `shrink` first. The ridge goes to every G_i in equal
parts, so it draws towards the mean and copies of one input are still returned.
Statistics: `plait.merging.statistics.gram`; a diagonal one [in] gives a column-wise mean.
Paper: Jin et al., 2022, arXiv 2212.09849. Departures: Grams are means over tokens, so that no
input counts for the length of its data; weights; the ridge. Biases take the weighted sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod


@dataclass(frozen=True)
class Fit:
    """dW = (sum_i dW_i P_i) S^-1 of one site, float64; M_i is never formed."""

    parts: Sequence[Tensor]
    """P_i = w_i G_i [in, in]; or the diagonals [in] of M_i itself."""
    factor: Tensor | None = None
    """Cholesky factor of S; None where the parts are divided by it already."""

    def solve(self, rows: Tensor) -> Tensor:
        """X S^-1 of rows X [n, in]; S is symmetric, so that S (X S^-1)^T = X^T."""
        return rows if self.factor is None else torch.cholesky_solve(rows.mT, self.factor).mT


@dataclass
class RegMean(Merge):
    shrink: float = 0.9
    """Factor on the Grams' off-diagonal entries (paper: 0.9; 0 is a column-wise mean)."""
    ridge: float = 1e-4
    """Added to the diagonal of S, as a share of its mean."""
    scale: float = 1.0
    """Factor on the result."""

    spaces = ("factors", "delta")
    needs = frozenset({"gram"})

    def __post_init__(self) -> None:
        if not 0 <= self.shrink <= 1 or self.ridge < 0:
            raise PlaitError("regmean: shrink lies in [0, 1], and ridge is at least 0.")

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        fit = self._fit(changes, torch.tensor(list(weights), dtype=torch.float64))
        moved = [
            LowRank(low.B, fit.solve(_times(low.A, part)).to(low.A.dtype), low.scale)
            for low, part in zip(lows, fit.parts, strict=True)
        ]
        return LowRank.weighted_sum(moved, [self.scale] * len(moved))

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        return self._fit(changes, weights.flatten().double())

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        total = torch.stack([_times(one, p) for one, p in zip(block, found.parts, strict=True)])
        return (self.scale * found.solve(total.sum(0))).to(block.dtype)

    def _fit(self, changes: Changes, weights: Tensor) -> Fit:
        if bool((weights < 0).any()) or not bool((weights > 0).any()):
            raise PlaitError("regmean: weights must not be negative, nor all 0.")
        grams = [g.double() for g in changes.known("gram")]
        _check(grams, changes)
        if grams[0].dim() == 1 or self.shrink == 0:
            return Fit(self._columns([g if g.dim() == 1 else g.diagonal() for g in grams], weights))
        off = self.shrink
        parts = [w * (off * g).diagonal_scatter(g.diagonal()) for w, g in _zip(weights, grams)]
        pad = self._pad(torch.stack([part.diagonal() for part in parts]), weights)
        for w, part in _zip(weights, parts):
            part.diagonal().add_(w * pad)
        factor, failed = torch.linalg.cholesky_ex(torch.stack(parts).sum(0))
        if bool(failed):
            raise PlaitError(
                f"site {changes.path!r}: the Grams are singular; raise ridge= (now {self.ridge})."
            )
        return Fit(parts, factor)

    def _columns(self, diagonals: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
        parts = weights[:, None] * torch.stack(list(diagonals))
        parts = parts + weights[:, None] * self._pad(parts, weights)
        total = parts.sum(0)
        # Without a ridge a feature that no input ever saw takes the plain mean.
        mean = (weights / weights.sum())[:, None]
        return list(torch.where(total > 0, parts / total, mean))

    def _pad(self, diagonals: Tensor, weights: Tensor) -> Tensor:
        """The ridge for a weight of 1, from S's parts [k, in]; without any data the plain mean."""
        level = diagonals.sum(0).mean()
        return torch.where(level > 0, self.ridge * level, 1.0) / weights.sum()


def _zip(weights: Tensor, tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(weights, tensors, strict=True))


def _check(grams: Sequence[Tensor], changes: Changes) -> None:
    width = changes.shape[1]
    for g in grams:
        if tuple(g.shape) not in ((width, width), (width,)) or g.dim() != grams[0].dim():
            raise PlaitError(
                f"site {changes.path!r}: a gram statistic is {list(g.shape)}; the inputs' must "
                f"all be [{width}, {width}], or all diagonals [{width}]."
            )


def _times(matrix: Tensor, m: Tensor) -> Tensor:
    wide = matrix.double()
    return wide * m if m.dim() == 1 else wide @ m


METHOD = MergeMethod(
    name="regmean",
    title="RegMean: the least-squares fit to every input's outputs on its data",
    paper="Jin et al., 2022, arXiv 2212.09849",
    merge=RegMean,
)
