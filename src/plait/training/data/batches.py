"""Batches: which examples together and in which order, and how they become tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from plait.training.data.encode import IGNORE, Encoded
from plait.training.data.packing import Packed, block_mask


@dataclass
class Collator:
    """Pads a list of examples (or packed rows) on the right to the longest, rounded up.

    Gives input_ids, labels and attention_mask as int64 tensors [batch, length], `length` being the
    longest rounded up to `multiple` but never beyond `max_length`. Packed rows also give
    position_ids, and an attention_mask of [batch, 1, length, length] that fits `attention`: bool
    for "sdpa", additive in `dtype` for "eager", none at all for "flash_attention_2" (load the model
    with use_cache=False then).
    """

    pad_token_id: int
    multiple: int = 8
    max_length: int | None = None
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float32

    def __call__(self, items: Sequence[Encoded] | Sequence[Packed]) -> dict[str, torch.Tensor]:
        length = self._length(max(len(item) for item in items))
        batch = {
            "input_ids": _pad([item.input_ids for item in items], length, self.pad_token_id),
            "labels": _pad([item.labels for item in items], length, IGNORE),
        }
        if not all(isinstance(item, Packed) for item in items):
            ones = [[1] * len(item) for item in items]
            return {**batch, "attention_mask": _pad(ones, length, 0)}
        packed = [item for item in items if isinstance(item, Packed)]
        padding = [list(range(length - len(item))) for item in packed]
        rows = [item.position_ids + pad for item, pad in zip(packed, padding, strict=True)]
        batch["position_ids"] = torch.tensor(rows)
        if self.attention != "flash_attention_2":
            # The padding is a segment of its own: a row that may look nowhere would give NaN.
            mask = block_mask(_pad([item.segments for item in packed], length, -1))
            batch["attention_mask"] = mask if self.attention == "sdpa" else self._additive(mask)
        return batch

    def _length(self, longest: int) -> int:
        rounded = -(-longest // self.multiple) * self.multiple
        return rounded if self.max_length is None else max(longest, min(rounded, self.max_length))

    def _additive(self, mask: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros((), dtype=self.dtype)
        return torch.where(mask, zero, torch.finfo(self.dtype).min)


def length_grouped_order(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, window: int = 50
) -> list[int]:
    """A random order of the examples in which batches hold similar lengths.

    Shuffles, sorts by length within windows of `window` batches, then shuffles the batches; the
    batch with the longest example comes first, so that a lack of memory shows at once. The same
    (seed, epoch) gives the same order on every machine, so a resumed run continues where it was.
    """
    draw = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    size = window * batch_size
    windows = [sorted(order[s : s + size], key=lambda i: -lengths[i]) for s in _steps(order, size)]
    grouped = [index for block in windows for index in block]
    batches = [grouped[s : s + batch_size] for s in _steps(grouped, batch_size)]
    short = [batches.pop()] if batches and len(batches[-1]) < batch_size else []
    draw.shuffle(batches)
    batches.sort(key=lambda batch: lengths[batch[0]] < max(lengths))  # stable: only that one moves
    return [index for batch in batches + short for index in batch]


class LengthGroupedSampler(Sampler[int]):
    """`length_grouped_order` as a torch sampler.

    Every pass is one epoch; `set_epoch` says which comes next (the Trainer and accelerate call it).
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(length_grouped_order(self.lengths, self.batch_size, self.seed, self.epoch))


def _steps(items: Sequence[int], size: int) -> range:
    return range(0, len(items), size)


def _pad(rows: list[list[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
