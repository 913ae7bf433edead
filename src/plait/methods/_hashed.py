"""Random matrices that are a hash of their position and a key: nothing to keep, nothing to seed.

The same bits on every device and in every version of torch, whole or a few rows at a time, so that
a method can afford more random numbers than memory holds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 17
"""Entries generated at once: they stay in a second-level cache."""

Key = tuple[int, int]
"""Two int32 numbers."""


def basis(key: Key, start: int, stop: int, size: int, device: torch.device) -> Tensor:
    """Random matrices `start` to `stop` of `key`, [stop - start, size], uniform on [-1, 1).

    Two 16-bit fields of a 32-bit hash of the position (xor-shift and multiply rounds, between which
    both halves of the key enter); int32 arithmetic wraps alike everywhere.
    """
    words = (size + 1) // 2
    first = (start * words + 2**31) % 2**32 - 2**31  # as int32 wraps it
    x = torch.arange((stop - start) * words, device=device, dtype=torch.int32).add_(first)
    x.bitwise_xor_(key[0]).mul_(0x7FEB352D)
    _shift(x, 15)
    x.add_(key[1]).mul_(0x2C1B3C6D)
    _shift(x, 12)
    x.mul_(0x297A2D39)
    _shift(x, 15)
    fields = x.view(torch.int16).view(stop - start, 2 * words)[:, :size]
    return fields.to(torch.float32).mul_(2.0**-15)


def blocks(key: Key, k: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The k matrices of `key` as rows of `like`'s length, a few at a time."""
    step = max(1, BLOCK // max(like.numel(), 1))
    for start in range(0, k, step):
        stop = min(start + step, k)
        block = basis(key, start, stop, like.numel(), like.device)
        yield slice(start, stop), block.to(like.dtype)


def _shift(x: Tensor, bits: int) -> None:
    """x ^= x >> bits in place, with zeros shifted in."""
    x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))
