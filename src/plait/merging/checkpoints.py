"""Full checkpoints on disk: what they hold, read tensor by tensor from mapped files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from plait.adapter.formats.tensors import DTYPES, check_names
from plait.errors import FormatError

MAPPED = 1 << 26
"""Bytes read after which the files are mapped anew: pages that were read count as this process's
memory for as long as they are mapped, in the end all of every input."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """A safetensors file, or a folder of them. Nothing is read but headers until `read`.

    A folder's index says which files count, or else model.safetensors alone does where it is there:
    other copies of the weights often lie beside them. Raises FormatError for a missing or damaged
    file, for names that stand in two files, and for pickled weights, which can run code.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._open: dict[Path, Any] = {}
        self._read = 0

    @cached_property
    def files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        found = self._listed() or sorted(self.path.glob("*.safetensors"))
        if not found:
            pickled = sorted(p.name for p in self.path.glob("*.bin"))
            why = f" ({pickled[0]} is a pickle, which can run code; convert it)" if pickled else ""
            raise FormatError(f"{self.path} holds no .safetensors weights{why}.")
        return found

    def _listed(self) -> list[Path]:
        """The files that the folder's index names, or the one that needs no index."""
        whole = self.path / "model.safetensors"
        index = self.path / "model.safetensors.index.json"
        if not index.is_file():
            return [whole] if whole.is_file() else []
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
            found = [self.path / Path(name).name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FormatError(f"{index}: damaged, or not an index of weights.") from None
        for file in found:
            if not file.is_file():
                raise FormatError(f"{file} is missing, though {index.name} names it.")
        return found

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        """{name: what the headers say}, in the order of the files."""
        found: dict[str, Entry] = {}
        for file in self.files:
            opened = self._opened(file)
            names = list(opened.keys())
            check_names(file, names)
            for name in names:
                if name in found:
                    raise FormatError(f"{name!r} stands in {found[name].file} and in {file}.")
                piece = opened.get_slice(name)
                kind = piece.get_dtype()
                if kind not in DTYPES:
                    raise FormatError(f"{file}: {name!r} is of the unknown type {kind}.")
                found[name] = Entry(file, tuple(piece.get_shape()), DTYPES[kind])
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file where safetensors can."""
        if self._read > MAPPED:
            self.release()
        found: Tensor = self._opened(self.entries[name].file).get_tensor(name)
        self._read += found.nbytes
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        file = self.path / "config.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return found if isinstance(found, dict) else {}

    def _opened(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._open:
            try:
                opened = safe_open(file, framework="pt").__enter__()
            except (SafetensorError, OSError) as e:
                raise FormatError(f"{file}: damaged, or not a safetensors file ({e}).") from None
            self._open[file] = opened
        return self._open[file]

    def release(self) -> None:
        """Let go of the mapped files; they are mapped anew when something is read."""
        while self._open:
            self._open.popitem()[1].__exit__(None, None, None)
        self._read = 0

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def holds_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a path holds a model's own weights; an adapter's folder does not."""
    where = Path(path)
    if where.suffix == ".safetensors":
        return True
    adapter = (where / "adapter_config.json").is_file() or (where / "plait.json").is_file()
    return where.is_dir() and not adapter
