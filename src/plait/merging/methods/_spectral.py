"""Merges by singular vectors: what the inputs are made of, and frames made orthonormal together.

Everything stays in factors. Dense code takes as many singular vectors of an adapter as the matrix
has; all but its rank of them are arbitrary fillers of the null space, and yet they take part in the
orthogonalisation and change the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plait.linalg import LowRank, krylov_svd
from plait.merging.changes import Changes
from plait.merging.method import Merge

NOISE = 1e-6
"""Singular values below this share of the largest are rounding; their vectors mean nothing."""
Triplets = tuple[Tensor, Tensor, Tensor]


class SpectralMerge(Merge):
    """Subclasses say `merge`; matrices of full checkpoints are brought into factors first."""

    spaces = ("factors", "delta")

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        """The merge, in factors; None for vectors, which have no singular vectors to speak of."""
        if min(changes.shape) == 1:
            return None
        lows = changes.lows
        if lows is None:
            shorter = min(changes.shape)
            parts = (krylov_svd(changes.whole(i), shorter) for i in range(changes.k))
            lows = [LowRank.from_svd(*part) for part in parts]
        return self.merge(lows, weights.flatten().tolist(), changes)

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        if found is None:
            return (weights * block).sum(0)
        return found.rows(slice(rows.start, rows.stop)).dense(block.dtype)


def triplets(low: LowRank, largest: float | None = None) -> Triplets:
    """U [out, p], S [p] descending and V [in, p] in float64, without what is rounding.

    Rounding is below NOISE of `largest` (of the largest singular value itself, if None).
    """
    U, S, Vh = low.to(dtype=torch.float64).svd()
    if largest is None:
        largest = float(S[0]) if len(S) else 0.0
    kept = NOISE * largest < S
    return U[:, kept], S[kept], Vh[kept].mT


def orthonormal(frame: Tensor, damping: float) -> Tensor:
    """The orthonormal frame [n, R] nearest to one of unit columns: its polar factor, damped.

    A singular value s of the frame becomes s^2 / sqrt(s^4 + damping^2): 1 but where it is small,
    and 0 at 0. So columns that (nearly) repeat others share a direction instead of having their
    differences, which are rounding, blown up. 0 takes the polar factor on the frame's own span.
    """
    squares, V = torch.linalg.eigh(frame.mT @ frame)
    squares = squares.clamp_min(0)
    if len(squares):
        squares = torch.where(squares > NOISE**2 * squares[-1], squares, 0)
    length = (squares.square() + damping**2).sqrt()
    inverse = squares.sqrt() / torch.where(squares > 0, length, 1)
    return frame @ (V * inverse) @ V.mT


def assembled(parts: Sequence[Triplets], damping: float, dtype: torch.dtype) -> LowRank:
    """sum over all triplets of s u* v*^T, with all u made orthonormal together, and all v."""
    U, V = (torch.cat([part[side] for part in parts], 1) for side in (0, 2))
    S = torch.cat([part[1] for part in parts])
    left, right = orthonormal(U, damping), orthonormal(V, damping)
    return LowRank((left * S).to(dtype), right.mT.to(dtype))
