"""A teacher's distributions in a file, found again by the examples that they belong to.

    keys [N]  ──►  starts [N + 1]  ──►  ids, shares [n, k]

An example is known by its token ids and labels, so rows are found whatever the order, the batch,
the padding or the packing. A row stands for each label but an example's first, which nothing
predicts; shares add up to 1, or are 0 where the teacher has nothing to say. The file is mapped, and
rows are read when they are asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapter.formats.atomic import tensors_writer, write_file
from plait.errors import FormatError, PlaitError

IGNORE = -100
FORMAT = "plait-distributions-1"
Rows = tuple[Tensor, Tensor]
"""Token ids [n, k] and their shares [n, k]."""


def key_of_example(ids: Sequence[int], labels: Sequence[int]) -> int:
    """A signed 64-bit number of an example's token ids and its labels from the second on."""
    numbers = torch.tensor([*ids, -1, *labels[1:]], dtype=torch.int64)
    digest = hashlib.blake2b(numbers.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def write_rows(
    path: str | os.PathLike[str], examples: Mapping[int, Rows], facts: Mapping[str, Any]
) -> Path:
    """Write {key: rows of one example}; `facts` (plain data) go into the header."""
    if not examples:
        raise PlaitError("there are no rows to write.")
    starts = torch.tensor([0, *(len(ids) for ids, _ in examples.values())]).cumsum(0)
    tensors = {
        "keys": torch.tensor(list(examples), dtype=torch.int64),
        "starts": starts,
        "ids": torch.cat([ids.to(torch.int32) for ids, _ in examples.values()]),
        "shares": torch.cat([shares.float() for _, shares in examples.values()]),
    }
    header = {"format": FORMAT, "facts": json.dumps(dict(facts))}
    return write_file(Path(path), tensors_writer(tensors, header))


class CachedRows:
    """Rows of a file; `find` gives those of a batch."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise PlaitError(f"{self.path} does not exist; it should hold a teacher's rows.")
        try:
            self._file = safe_open(str(self.path), "pt")
        except SafetensorError as error:
            raise FormatError(f"{self.path} is no safetensors file ({error}).") from error
        header = self._file.metadata() or {}
        if header.get("format") != FORMAT:
            raise FormatError(f"{self.path} holds no distributions that Plait wrote.")
        self.facts: dict[str, Any] = json.loads(header.get("facts", "{}"))
        keys = self._file.get_tensor("keys").tolist()
        self._place = {key: i for i, key in enumerate(keys)}
        self._starts = self._file.get_tensor("starts").tolist()
        self._ids, self._shares = (self._file.get_slice(name) for name in ("ids", "shares"))
        self.width = int(self._ids.get_shape()[1])
        if len(self._starts) != len(keys) + 1 or self._starts[-1] != self._ids.get_shape()[0]:
            raise FormatError(f"{self.path} is damaged: its rows do not fit its examples.")

    def __len__(self) -> int:
        return len(self._place)

    def of(self, key: int) -> Rows | None:
        """The rows of one example, or None."""
        place = self._place.get(key)
        if place is None:
            return None
        first, last = self._starts[place], self._starts[place + 1]
        return self._ids[first:last].long(), self._shares[first:last]

    def find(self, batch: Mapping[str, Any]) -> Rows:
        """Rows for every label of a batch that something predicts, in reading order, on the CPU.

        PlaitError for an example that the file does not know, or knows with other labels.
        """
        parts = []
        for ids, labels in examples_in(batch):
            count = sum(label != IGNORE for label in labels[1:])
            if not count:
                continue
            found = self.of(key_of_example(ids, labels))
            if found is None or len(found[0]) != count:
                raise PlaitError(
                    f"{self.path} has no rows for an example of {len(ids)} tokens; make it again "
                    "from this data, with the same tokenizer, template and max_length."
                )
            parts.append(found)
        if not parts:
            return torch.zeros(0, self.width, dtype=torch.long), torch.zeros(0, self.width)
        return torch.cat([ids for ids, _ in parts]), torch.cat([shares for _, shares in parts])


def examples_in(batch: Mapping[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """(token ids, labels) of every example, without padding; packed rows fall into theirs."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.dim() != 2:
        raise PlaitError("a batch needs input_ids and labels [rows, length] to find its rows by.")
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    plain = isinstance(mask, Tensor) and mask.dim() == 2
    for row in range(len(ids)):
        own, wanted = ids[row].tolist(), labels[row].tolist()
        if plain:
            real = [bool(m) for m in mask[row].tolist()]  # type: ignore[index]
            own = [i for i, r in zip(own, real, strict=True) if r]
            wanted = [i for i, r in zip(wanted, real, strict=True) if r]
            yield own, wanted
            continue
        starts = [0]
        if isinstance(positions, Tensor):
            places = positions.expand(len(ids), -1)[row].tolist()
            starts = [at for at, place in enumerate(places) if place == 0]
        for first, last in zip(starts, [*starts[1:], len(own)], strict=True):
            yield own[first:last], wanted[first:last]
