"""Cutting a merged site to a rank or to a share of its energy."""

from __future__ import annotations

from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank, randomized_svd

Cut = tuple[LowRank, float, float]
"""What is kept, the share of energy dropped, and the squared norm that it is a share of."""


def check_cut(rank: int | None, energy: float | None) -> None:
    """PlaitError for a rank below 1, or a share outside (0, 1]."""
    if rank is not None and rank < 1:
        raise PlaitError(f"rank must be at least 1, not {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise PlaitError(f"energy is a share in (0, 1], not {energy}.")


def cut_low_rank(low: LowRank, rank: int | None, energy: float | None) -> Cut:
    """The best approximation in factors; nothing is computed where nothing is asked for."""
    shorter = min(low.shape)
    limit = shorter if rank is None else rank
    if energy is None and low.rank <= limit:
        exact = rank is None  # then no share is asked for anywhere
        return low, 0.0, 0.0 if exact else float(low.norm()) ** 2
    kept, dropped = low.truncate(rank=limit, energy=energy)
    # The factors carry the root of each singular value on columns of norm one.
    square = float(kept.B.double().square().sum(-2).square().sum())
    return kept, dropped, square / (1 - dropped) if dropped < 1 else 0.0


def cut_matrix(matrix: Tensor, rank: int | None, energy: float | None, default: int) -> Cut:
    """A LowRank of a dense merge: of `rank`, or of the fewest components with `energy`, or of
    `default`. Where only a share is given, the sketch doubles until it holds that share."""
    square = float(matrix.double().square().sum())
    shorter = min(matrix.shape)
    width = min(shorter, default if rank is None else rank)
    while True:
        U, S, Vh = randomized_svd(matrix, width, power_iterations=4)
        held = S.double().square().cumsum(0)
        enough = energy is None or not square or float(held[-1]) >= energy * square
        if enough or rank is not None or width == shorter:
            break
        width = min(shorter, 2 * width)
    if energy is not None and len(S):
        width = min(width, int((held < energy * square).sum()) + 1)
    kept = float(held[width - 1]) if width else 0.0
    low = LowRank.from_svd(U[:, :width], S[:width], Vh[:width], matrix.dtype)
    return low, max(0.0, 1 - kept / square) if square else 0.0, square
