"""The first r steps of Gaussian elimination: where LoLDU's frozen factors come from.

    W ~ L diag(D) U        L [out, r], D [r], U [r, in]: rows of L in W's order, rows of U from 1 on

Which row is the pivot of a step decides everything after it, and rounding may decide between two
that are almost alike. So pivots are chosen once and then prescribed.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-6
"""Rows of U are divided by their pivot, but by the greatest one where that is below this share of
it: a direction of no weight must not come out a million times as long as the others."""


def choose_pivots(W: Tensor, rank: int) -> Tensor:
    """Indices [rank] of the rows that partial pivoting takes, in order."""
    swaps = torch.linalg.lu_factor_ex(W[:, :rank].double()).pivots  # singular W passes
    order = torch.arange(len(W), device=W.device)
    for step, other in enumerate((swaps - 1).tolist()):  # LAPACK counts from 1
        order[[step, other]] = order[[other, step]]
    return order[:rank]


def eliminate(W: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L, D, U in float64; L diag(D) U is W in the rows of `pivots` and in the first r columns, but
    for what a pivot below TINY adds."""
    rank = len(pivots)
    left = W[:, :rank].double()
    L = torch.zeros_like(left)
    D = left.new_zeros(rank)
    for step in range(rank):
        D[step] = left[pivots[step], step]
        if D[step] != 0:
            L[:, step] = left[:, step] / D[step]
        L[pivots[:step], step] = 0  # earlier pivots are done, up to rounding
        L[pivots[step], step] = 1
        left = left - torch.outer(L[:, step], left[pivots[step]])
    rows = torch.linalg.solve_triangular(
        L[pivots], W[pivots].double(), upper=False, unitriangular=True
    )
    greatest = D.abs().max()
    divisor = torch.where(D.abs() < TINY * greatest, greatest, D)
    return L, D, rows / torch.where(divisor == 0, 1.0, divisor)[:, None]
