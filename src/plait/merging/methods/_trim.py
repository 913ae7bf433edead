"""Which entries of a change stay: the largest of them, by a threshold for every input."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import kth_magnitude, kth_magnitudes
from plait.merging.changes import Changes

IN_MEMORY = 1 << 27
"""Entries up to which one change at a time is held in memory for its threshold (512 MB)."""


def check_density(method: str, density: float) -> None:
    if not 0 < density <= 1:
        raise PlaitError(f"{method}: density is a share in (0, 1], not {density}.")


def count_of(changes: Changes, share: float) -> int:
    """How many entries a share is: at least one, so that no site vanishes."""
    return max(1, math.floor(share * math.prod(changes.shape) + 1e-6))


def thresholds(changes: Changes, share: float) -> Tensor:
    """The magnitude from which an entry is among the largest `share` of its input, [k, 1, 1]."""
    return torch.zeros(changes.k, 1, 1) if share >= 1 else kth(changes, count_of(changes, share))


def kth(changes: Changes, count: int) -> Tensor:
    """The magnitude of the count-th largest entry of every input, [k, 1, 1]."""
    if math.prod(changes.shape) > IN_MEMORY:
        return kth_magnitudes(changes.blocks, [count] * changes.k)[:, None, None]
    found = [kth_magnitude(changes.whole(i), count) for i in range(changes.k)]
    return torch.tensor(found)[:, None, None]


def keep_from(block: Tensor, thresholds: Tensor) -> Tensor:
    """Entries of at least the threshold [k, 1, 1]; the others are 0."""
    # Compared as the thresholds were found: in float32.
    if block.dtype != torch.float32:
        return block * (block.abs().float() >= thresholds)
    kept = torch.empty_like(block)
    least = thresholds.float().nextafter(torch.zeros(())).flatten().tolist()
    for each, bound, into in zip(block, least, kept, strict=True):
        torch.hardshrink(each, bound, out=into)  # keeps what is larger than the bound
    return kept
