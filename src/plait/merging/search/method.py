"""What a search method's record is, and finding methods by listing their folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from plait.errors import PlaitError, unknown


@dataclass(frozen=True)
class SearchMethod:
    """The record that a method's file ends in."""

    name: str
    title: str
    paper: str
    run: Callable[..., Any]
    """`run(model, names, ...)`; the rest is the method's own."""


@cache
def _files() -> dict[str, str]:
    package = importlib.import_module("plait.merging.search.methods")
    names = [i.name for i in pkgutil.iter_modules(package.__path__) if not i.name.startswith("_")]
    return {name.replace("_", "-"): f"{package.__name__}.{name}" for name in names}


def search_method_names() -> list[str]:
    """Every search method's name, sorted."""
    return sorted(_files())


def get_search_method(name: str) -> SearchMethod:
    """The search method of that name; an error names the nearest."""
    key = name.lower().replace("_", "-")
    if key not in _files():
        raise unknown("search method", name, _files())
    method = getattr(importlib.import_module(_files()[key]), "METHOD", None)
    if not isinstance(method, SearchMethod) or method.name != key:
        raise PlaitError(f"{_files()[key]} must end in a METHOD record named {key!r}.")
    return method
