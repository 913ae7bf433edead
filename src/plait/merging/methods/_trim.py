"""Which entries of a change stay: the largest of them, by a threshold for every input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import kth_magnitude, kth_magnitudes
from plait.merging.changes import Changes

IN_MEMORY = 1 << 27
"""Entries up to which one change at a time is held in memory for its threshold (512 MB)."""


Density = float | Sequence[float]
"""One share for all inputs, or one for each."""


def check_density(method: str, density: Density) -> None:
    for share in density if isinstance(density, Sequence) else [density]:
        if not 0 < share <= 1:
            raise PlaitError(f"{method}: density is a share in (0, 1], not {share}.")


def densities(changes: Changes, density: Density) -> list[float]:
    """Each input's share."""
    if not isinstance(density, Sequence):
        return [density] * changes.k
    if len(density) != changes.k:
        raise PlaitError(f"{len(density)} densities for {changes.k} inputs; give one for each.")
    return list(density)


def count_of(changes: Changes, share: float) -> int:
    """How many entries a share is: at least one, so that no site vanishes."""
    return max(1, math.floor(share * math.prod(changes.shape) + 1e-6))


def thresholds(changes: Changes, density: Density) -> Tensor:
    """The magnitude from which an entry is among the largest share of its input, [k, 1, 1]."""
    shares = densities(changes, density)
    if min(shares) >= 1:
        return torch.zeros(changes.k, 1, 1)
    found = kth(changes, [count_of(changes, share) for share in shares])
    whole = torch.tensor([share >= 1 for share in shares])[:, None, None]
    return found.masked_fill(whole, 0.0)


def kth(changes: Changes, count: int | Sequence[int]) -> Tensor:
    """The magnitude of every input's count-th largest entry (or of its own count), [k, 1, 1]."""
    counts = [count] * changes.k if isinstance(count, int) else list(count)
    if math.prod(changes.shape) > IN_MEMORY:
        return kth_magnitudes(changes.blocks, counts)[:, None, None]
    found = [kth_magnitude(changes.whole(i), n) for i, n in enumerate(counts)]
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
