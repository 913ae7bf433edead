"""Methods found by listing a folder: each file ends in a record, and is called as the record is."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any, Generic, TypeVar

from plait.errors import PlaitError, unknown

Record = TypeVar("Record")
Way = TypeVar("Way")


class Folder(Generic[Record]):
    """The records of a package's files; `kind` names them in errors. Nothing is imported before a
    record is asked for."""

    def __init__(self, package: str, record: type[Record], kind: str) -> None:
        self.package, self.record, self.kind = package, record, kind

    @cached_property
    def files(self) -> dict[str, str]:
        """{name: module}; a file's name has underscores where the method's has hyphens."""
        path = importlib.import_module(self.package).__path__
        names = [i.name for i in pkgutil.iter_modules(path) if not i.name.startswith("_")]
        return {name.replace("_", "-"): f"{self.package}.{name}" for name in names}

    def names(self) -> list[str]:
        return sorted(self.files)

    def get(self, name: str, others: Collection[str] = ()) -> Record:
        """The record of that name (underscores count as hyphens); an error names the nearest, of
        the folder's or of `others`."""
        key = name.lower().replace("_", "-")
        if key not in self.files:
            raise unknown(self.kind, name, [*self.files, *others])
        record: Any = getattr(importlib.import_module(self.files[key]), "METHOD", None)
        if not isinstance(record, self.record) or record.name != key:  # type: ignore[attr-defined]
            raise PlaitError(f"{self.files[key]} must end in a METHOD record named {key!r}.")
        return record


def keywords(*functions: Callable[..., Any]) -> frozenset[str]:
    """The names of their parameters, without those of `**options`."""
    found = (p for f in functions for p in inspect.signature(f).parameters.values())
    return frozenset(p.name for p in found if p.kind is not p.VAR_KEYWORD)


def make_options(
    what: str, cls: type[Way], given: Mapping[str, Any], taken: Collection[str]
) -> Way:
    """The dataclass with its options, `given` over the defaults; an unknown one names the nearest.

    `taken` are the keywords of the function that options pass through: a field of such a name would
    never be given, so it is refused.
    """
    names = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    for name in names:
        if name in taken:
            raise PlaitError(
                f"{what} has an option {name!r}, which is a keyword of the function itself and "
                "would never reach it; give the option another name."
            )
    for name in given:
        if name not in names:
            raise unknown("option", name, names, where=what)
    return cls(**given)
