"""Writing a checkpoint tensor by tensor, so that memory never holds more than one of them.

A safetensors file begins with the places of all its tensors, which follow from shapes and types
alone: they are written first and the tensors after them, in order.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from plait.adapter.formats.tensors import DTYPES
from plait.errors import FormatError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Iterable[Planned], limit: int) -> list[list[Planned]]:
    """The tensors in their order, in shards of at most `limit` bytes (or of one tensor)."""
    shards: list[list[Planned]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """The names that transformers gives a checkpoint's files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_shard(file: Path, planned: Sequence[Planned], value: Callable[[Planned], Tensor]) -> None:
    """Write one file, asking for one tensor after the other; it appears when it is complete."""
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as out:
            out.write(_header(planned))
            for tensor in planned:
                made = value(tensor)
                if tuple(made.shape) != tensor.shape or made.dtype != tensor.dtype:
                    raise ValueError(f"{tensor.name}: planned {tensor}, made {made.shape}")
                out.write(made.contiguous().view(-1).view(torch.uint8).numpy().data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, file)
    except OSError as e:
        raise FormatError(f"{file} could not be written: {e.strerror or e}.") from e
    finally:
        part.unlink(missing_ok=True)


def write_index(folder: Path, shards: Mapping[str, Sequence[Planned]]) -> None:
    """transformers' list of which tensor lies in which file; one file needs none."""
    if len(shards) == 1:
        return
    where = {t.name: name for name, planned in shards.items() for t in planned}
    total = sum(t.nbytes for planned in shards.values() for t in planned)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _header(planned: Sequence[Planned]) -> bytes:
    facts: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in planned:
        end = at + tensor.nbytes
        place = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [at, end]}
        facts[tensor.name], at = place, end
    text = json.dumps(facts).encode()
    text += b" " * (-len(text) % 8)  # tensors begin aligned
    return struct.pack("<Q", len(text)) + text
