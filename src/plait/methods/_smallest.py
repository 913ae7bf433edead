"""The part of a matrix in its smallest singular directions."""

from __future__ import annotations

from torch import Tensor

from plait.linalg import gram_directions


def smallest_part(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [out, rank], A [rank, in] in float64 with B A the sum of W's `rank` smallest triplets.

    Only the singular vectors of the shorter side are needed: W_cut = U U^T W or W V V^T.
    """
    W = W.double()
    rows, _, flat = gram_directions(W)
    rows = rows.flip(0)[:rank]  # ascending
    return (rows.mT, rows @ W) if flat else (W @ rows.mT, rows)
