"""Pairing units of two models by their similarity, and choosing the pairs that are merged."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.errors import PlaitError


def best_pairs(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns [min(m, n)] of the pairing of [m, n] whose similarities' sum is greatest.

    In the order of the rows; by the Hungarian algorithm, in O(n^3).
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise PlaitError("matching units needs scipy: pip install scipy.") from error
    rows, columns = linear_sum_assignment(similarity.detach().cpu().numpy(), maximize=True)
    return torch.from_numpy(rows).long(), torch.from_numpy(columns).long()


def most_alike(values: Tensor, ratio: float) -> Tensor:
    """Which of these pairs are merged when a share `ratio` of them stays separate, bool [n].

    Exactly n - round(ratio n) of them, the most alike; ties by position, so that no tie changes a
    width.
    """
    count = len(values) - round(ratio * len(values))
    kept = torch.zeros(len(values), dtype=torch.bool)
    kept[values.argsort(descending=True, stable=True)[:count]] = True
    return kept
