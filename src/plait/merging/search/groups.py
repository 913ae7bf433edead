"""Which coefficients act where: groups of sites, and chunks of a site's rows or columns.

grouping   adapter: one c for all of an adapter's sites     layer: one a block     site: one each
chunks     K: a site's rows (or columns) in K even pieces, each with a c of its own
           0: no c at all, the site stays as it started
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from plait.adapter import Adapter, Site
from plait.adapter.weighting import Weight
from plait.errors import PlaitError, unknown

Grouping = Literal["adapter", "layer", "site"]
Along = Literal["rows", "columns"]
Chunks = int | Mapping[str, int] | Callable[[str], int]
"""K for every site, by pattern of the path (as in "*.mlp.*"; others have 1), or as a function."""
_LAYER = re.compile(r"^(.*?(?:^|\.)\d+)(?:\.|$)")


@dataclass(frozen=True)
class Part:
    """The coefficients of one site: of all of it, of its chunks in order, or none."""

    groups: tuple[int, ...]
    along: Along
    size: int
    """Rows or columns that are chunked."""

    def weight(self, row: Sequence[Any], values: Tensor, held: float) -> Weight:
        """What `plait.activate` takes here, from an adapter's coefficients [g] (twice: one by one,
        and as a tensor); `held` where there are none."""
        if len(self.groups) < 2:
            return row[self.groups[0]] if self.groups else held
        where = torch.repeat_interleave(torch.tensor(self.groups), torch.tensor(self.widths()))
        found = values[where.to(values.device)]
        return found[:, None] if self.along == "rows" else found[None]

    def widths(self) -> list[int]:
        """How many rows or columns each chunk has."""
        even, longer = divmod(self.size, len(self.groups))
        return [even + (i < longer) for i in range(len(self.groups))]

    def described(self, row: Sequence[float], held: float) -> float | dict[str, Any]:
        """The same as plain data: a number, or the chunks' numbers and the size."""
        if len(self.groups) < 2:
            return row[self.groups[0]] if self.groups else held
        return {self.along: [row[g] for g in self.groups], "of": self.size}

    def pieces(self) -> Iterator[tuple[int, slice]]:
        """(group, its rows or columns)."""
        start = 0
        for group, width in zip(self.groups, self.widths() if self.groups else [], strict=True):
            yield group, slice(start, start + width)
            start += width


def parts_of(
    adapters: Sequence[Adapter],
    grouping: Grouping | Callable[[str], str],
    chunks: Chunks,
    along: Along,
) -> tuple[list[str], dict[str, Part]]:
    """The groups' names, and {site path: its part}; a group is a name for all its sites."""
    if along not in get_args(Along):
        raise unknown("direction", along, get_args(Along))
    named, counted = _grouping(grouping), _chunks(chunks)
    sites = {path: delta.site for a in adapters for path, delta in a.deltas.items()}
    groups: dict[str, int] = {}
    parts: dict[str, Part] = {}
    for path, site in sites.items():
        size = _size(site, along)
        count = min(counted(path), size)
        if count < 0:
            raise PlaitError(f"chunks at {path!r} is {count}; give 0 or more.")
        names = [named(path)]
        if count != 1:
            names = [f"{names[0]} [{along} {i + 1} of {count}]" for i in range(count)]
        indices = tuple(groups.setdefault(name, len(groups)) for name in names)
        parts[path] = Part(indices, along, size)
    return list(groups), parts


def _size(site: Site, along: Along) -> int:
    """Rows or columns that may be chunked; 1 where the site has no matrix."""
    if len(site.shape) != 2 or site.kind == "module":
        return 1
    if along == "columns" and site.kind != "linear":
        return 1
    return site.shape[0 if along == "rows" else 1]


def _grouping(grouping: Grouping | Callable[[str], str]) -> Callable[[str], str]:
    if callable(grouping):
        return grouping
    if grouping not in get_args(Grouping):
        raise unknown("grouping", grouping, get_args(Grouping))
    return {"adapter": lambda path: "all", "layer": layer_of, "site": lambda path: path}[grouping]


def _chunks(chunks: Chunks) -> Callable[[str], int]:
    if callable(chunks):
        return chunks
    if not isinstance(chunks, Mapping):
        return lambda path: chunks
    by_pattern = dict(chunks)

    def first(path: str) -> int:
        return next((n for p, n in by_pattern.items() if p == path or fnmatchcase(path, p)), 1)

    return first


def layer_of(path: str) -> str:
    """The path up to its first number ("model.layers.3"); one without a number is its own layer."""
    found = _LAYER.match(path)
    return found.group(1) if found else path
