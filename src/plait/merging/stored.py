"""Statistics of sites in files: {site path: tensor}, each tensor once though sites share it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from plait.adapter.formats.atomic import tensors_writer, write_file
from plait.errors import PlaitError

Statistics = Mapping[str, Tensor] | str | os.PathLike[str]


class Stored:
    """A file of statistics, mapped: a site's tensor is read when it is asked for."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise PlaitError(f"{self.path} does not exist; it should hold statistics of sites.")
        try:
            self._file = safe_open(str(self.path), "pt")
        except SafetensorError as error:
            raise PlaitError(f"{self.path} is no safetensors file ({error}).") from error
        self._same = json.loads((self._file.metadata() or {}).get("same", "{}"))
        self._names = set(self._file.keys())

    def get(self, path: str) -> Tensor | None:
        name = self._same.get(path, path)
        return self._file.get_tensor(name) if name in self._names else None


def save_statistics(path: str | os.PathLike[str], found: Mapping[str, Tensor]) -> Path:
    """Write {site path: tensor} as one safetensors file, atomically; shared tensors once."""
    first: dict[int, str] = {}
    same = {p: first.setdefault(id(tensor), p) for p, tensor in found.items()}
    tensors = {p: found[p] for p in first.values()}
    shared = {p: name for p, name in same.items() if p != name}
    return write_file(Path(path), tensors_writer(tensors, {"same": json.dumps(shared)}))


def open_statistics(
    method: str, needs: frozenset[str], given: Sequence[Statistics] | None, count: int
) -> list[Mapping[str, Tensor] | Stored] | None:
    """What was given for each input; an error where a method needs what was not given."""
    if given is None:
        if needs:
            raise PlaitError(
                f"merge method {method!r} needs statistics of kind {' and '.join(sorted(needs))}; "
                "compute them with plait.merging.statistics and pass merge(..., statistics=[...])."
            )
        return None
    if isinstance(given, Mapping | str | os.PathLike) or len(given) != count:
        raise PlaitError(f"statistics takes a list with one mapping or file for {count} inputs.")
    return [item if isinstance(item, Mapping) else Stored(item) for item in given]
