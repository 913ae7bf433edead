"""Packing: several short examples in one row, each seeing only itself.

    row        a a a a a b b b c c | pad pad
    positions  0 1 2 3 4 0 1 2 0 1 |  0   1       attention: block-diagonal and causal

First-fit decreasing: the longest example first, each into the first row with room; at most 11/9 of
the least number of rows, plus 6/9 (Dosa, 2007). For flash attention, restarting positions are
enough; SDPA and eager attention need the block mask, which the collator makes (transformers guesses
it from the positions only where no key-value cache is made, so this guess is not relied on).

Not for models with sliding-window or recurrent layers: there the mask alone does not part examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from plait.training.data.encode import IGNORE, Encoded


@dataclass(frozen=True)
class Packed:
    """One row of several examples; `segments` numbers them 0, 1, ... token by token."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    segments: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


def pack(examples: Sequence[Encoded], max_length: int) -> list[Packed]:
    """Rows of at most `max_length` tokens holding every example once.

    The result depends on the examples and their order only. ValueError for an example that is
    longer than `max_length` (encode with the same limit).
    """
    longest = max((len(example) for example in examples), default=0)
    if longest > max_length:
        raise ValueError(
            f"pack: an example has {longest} tokens, more than max_length={max_length}"
        )
    rows: list[list[Encoded]] = []
    room = _Room(len(examples), max_length)
    for index in sorted(range(len(examples)), key=lambda i: -len(examples[i])):
        row = room.first_fit(len(examples[index]))
        if row == len(rows):
            rows.append([])
        rows[row].append(examples[index])
    return [_join(row) for row in rows]


def block_mask(segments: torch.Tensor) -> torch.Tensor:
    """[batch, length] segment numbers -> [batch, 1, length, length] bool, True where a token may
    look: at itself and earlier tokens of its own segment."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril()


def _join(examples: list[Encoded]) -> Packed:
    packed = Packed([], [], [], [])
    for number, example in enumerate(examples):
        packed.input_ids.extend(example.input_ids)
        # The last token of the example before must not learn to predict this one's first.
        packed.labels.extend([IGNORE, *example.labels[1:]])
        packed.position_ids.extend(range(len(example)))
        packed.segments.extend([number] * len(example))
    return packed


class _Room:
    """The room left in up to `count` rows, as a tree of maxima: a first fit is O(log count)."""

    def __init__(self, count: int, size: int) -> None:
        self.leaves = 1 << max(0, count - 1).bit_length()
        self.tree = [size] * (2 * self.leaves)

    def first_fit(self, need: int) -> int:
        node = 1
        while node < self.leaves:
            node = 2 * node + (self.tree[2 * node] < need)
        row = node - self.leaves
        self.tree[node] -= need
        while node > 1:
            node //= 2
            self.tree[node] = max(self.tree[2 * node], self.tree[2 * node + 1])
        return row
