"""The record that a merge method publishes, and finding methods by listing their folder."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from plait.errors import PlaitError, unknown
from plait.linalg import LowRank


@dataclass(frozen=True)
class NoOptions:
    """For methods that have no options of their own."""


@dataclass(frozen=True)
class MergeMethod:
    """One way to merge: `merge(deltas, weights, **options) -> LowRank`, pure, of one site.

    `deltas` are `LowRank`s of equal shape, in the order of the adapters; an adapter that does not
    touch the site comes as rank 0. `options` is a dataclass of what the function takes beside them.
    """

    name: str
    title: str
    paper: str
    merge: Callable[..., LowRank]
    options: type = NoOptions


@cache
def _files() -> dict[str, str]:
    package = importlib.import_module("plait.merging.methods")
    names = [i.name for i in pkgutil.iter_modules(package.__path__) if not i.name.startswith("_")]
    return {name.replace("_", "-"): f"{package.__name__}.{name}" for name in names}


def merge_method_names() -> list[str]:
    """Every merge method's name, sorted."""
    return sorted(_files())


def get_merge_method(name: str | MergeMethod) -> MergeMethod:
    """The merge method of that name (underscores count as hyphens); an error names the nearest."""
    if isinstance(name, MergeMethod):
        return name
    key = name.lower().replace("_", "-")
    if key not in _files():
        raise unknown("merge method", name, _files())
    method = getattr(importlib.import_module(_files()[key]), "METHOD", None)
    if not isinstance(method, MergeMethod) or method.name != key:
        raise PlaitError(f"{_files()[key]} must end in a METHOD record named {key!r}.")
    return method


def merge_options(method: MergeMethod, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of `method`, `given` over its defaults; an unknown one names the nearest."""
    names = [field.name for field in dataclasses.fields(method.options)]
    for name in given:
        if name not in names:
            raise unknown("option", name, names, where=f"merge method {method.name!r}")
    return dataclasses.asdict(method.options(**given))
