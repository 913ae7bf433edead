"""Dropout whose mask is a function of a seed: drawn again in backward, never stored.

A stored mask costs a byte an element and, with the dropped copy of x, five bytes more than x
itself for the whole of the forward pass. Drawing it twice costs time instead, so the draw must be
cheap: on a CPU `bernoulli_` takes about 7.5 ns an element, while comparing 16-bit fields of random
64-bit words with a threshold takes 0.9 ns (8-bit fields half of that).

The global random state is neither read nor advanced here: seeds come from the caller.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

_ROW_MULTIPLE = 8  # blocks of rows end on a word's boundary: any blocking draws the same mask
_BLOCK_ELEMENTS = 1 << 16  # x, mask and product of one block stay in a second-level cache


class _Threshold(NamedTuple):
    field: torch.dtype
    lowest_kept: int
    keep: float


@lru_cache(maxsize=64)
def _threshold(p: float) -> _Threshold:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {p}")
    field = torch.int8 if (p * 256).is_integer() else torch.int16
    levels = 1 << (8 * field.itemsize)
    dropped = min(round(p * levels), levels - 1)
    # The fields are signed, and the lowest ones are dropped.
    return _Threshold(field, dropped - levels // 2, 1.0 - dropped / levels)


class Dropout(NamedTuple):
    """Dropout with probability p (in [0, 1), resolved to 1/65536) under the mask of `seed`."""

    p: float
    seed: int

    @property
    def keep(self) -> float:
        """The exact probability with which an element is kept."""
        return _threshold(self.p).keep

    def stream(self, device: torch.device) -> MaskStream:
        """The mask, from its beginning."""
        return MaskStream(self, device)


def make_dropout(p: float, seed: int | None) -> Dropout | None:
    """The dropout of a kernel call: None for p = 0, and a fresh seed where none is given.

    The seed comes from PyTorch's default CPU generator because `torch.utils.checkpoint` restores
    that one before it recomputes: the recomputed forward then draws the same mask.
    """
    if p == 0.0:
        return None
    _threshold(p)  # refuses an impossible p before a seed is spent
    return Dropout(p, int(torch.randint(2**62, ()).item()) if seed is None else seed)


class MaskStream:
    """The keep mask of an activation, drawn block of rows by block of rows.

    The blocks' concatenation depends on the dropout, the device type and the number of elements
    only, provided that every block but the last has a multiple of 8 rows.
    """

    def __init__(self, drop: Dropout, device: torch.device) -> None:
        self._field, self._lowest_kept, _ = _threshold(drop.p)
        self._generator = torch.Generator(device=device).manual_seed(drop.seed)

    def next(self, *shape: int) -> Tensor:
        """The mask of the next prod(shape) elements: integers, 1 where kept and 0 where dropped."""
        count = prod(shape)
        per_word = 8 // self._field.itemsize
        words = torch.empty(
            -(-count // per_word), dtype=torch.int64, device=self._generator.device
        ).random_(-(2**63), None, generator=self._generator)
        # In place keeps the integer dtype, which vectorises; a boolean result is 20 times slower.
        return words.view(self._field)[:count].ge_(self._lowest_kept).view(shape)


def dropout_mask(
    shape: tuple[int, ...], p: float, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The whole keep mask of `shape` for (p, seed): independent entries, 1 kept and 0 dropped.

    Same arguments, same mask. Entries are int8 or int16, to multiply with; divide the product by
    `keep_probability(p)` for inverted dropout.
    """
    return Dropout(p, seed).stream(torch.device(device)).next(*shape)


def keep_probability(p: float) -> float:
    """The exact probability with which `dropout_mask` keeps an element: 1 - p to 1/131072."""
    return _threshold(p).keep


def row_blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of rows, each a multiple of 8 rows but the last, small enough for the cache."""
    step = max(_BLOCK_ELEMENTS // max(columns, 1) // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
