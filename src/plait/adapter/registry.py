"""Finding methods by listing folders: one file, one method, named after it.

A file `methods/lora_xs.py` that ends in a `METHOD` record is the method `lora-xs`; there is no list
to keep and no registration side effect. Third parties call `register(METHOD)` or publish an entry
point in the group `plait.methods`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from functools import cache

from plait.adapter.method import AXES, Initializer, Method
from plait.errors import PlaitError, unknown

ROOMS = ("methods", "initializers", "rules", "routers")
_registered: dict[str, Method] = {}


@cache
def _files() -> dict[str, str]:
    """{method name: module} of the four rooms, without importing any method."""
    found: dict[str, str] = {}
    for room in ROOMS:
        package = importlib.import_module(f"plait.{room}")
        for info in pkgutil.iter_modules(package.__path__):
            if not info.name.startswith("_"):
                found[info.name.replace("_", "-")] = f"plait.{room}.{info.name}"
    return found


@cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {e.name: e for e in importlib.metadata.entry_points(group="plait.methods")}


def names(room: str | None = None) -> list[str]:
    """Every method's name, sorted; of Plait's own only those in `room`, where one is given."""
    own = {n for n, module in _files().items() if room in (None, module.split(".")[1])}
    return sorted({*own, *_entry_points(), *_registered})


def get_method(name: str | Method) -> Method:
    """The method of that name (underscores count as hyphens); an error names the nearest."""
    if isinstance(name, Method):
        return name
    key = name.lower().replace("_", "-")
    if key in _registered:
        return _registered[key]
    if key in _files():
        return _load(key, _files()[key])
    if key in _entry_points():
        return register(_entry_points()[key].load())
    raise unknown("method", name, names(), where="`plait methods`")


@cache
def _load(key: str, module: str) -> Method:
    method = getattr(importlib.import_module(module), "METHOD", None)
    if not isinstance(method, Method) or method.name != key:
        raise PlaitError(f"{module} must end in a METHOD record named {key!r}.")
    return method


def register(method: Method) -> Method:
    """Make a method of your own known by its name (refuses to shadow one of Plait's)."""
    if method.axis not in AXES:
        raise PlaitError(f"method {method.name!r} has axis {method.axis!r}; use one of {AXES}.")
    if method.name in _files():
        raise PlaitError(f"method {method.name!r} is one of Plait's own; choose another name.")
    _registered[method.name] = method
    return method


def get_initializer(spec: str | Initializer | None) -> Initializer | None:
    """An initialiser from its name (paper's defaults) or an instance."""
    if spec is None or isinstance(spec, Initializer):
        return spec
    method = get_method(spec)
    if method.initializer is None:
        raise PlaitError(f"method {method.name!r} is no initialiser (axis: {method.axis}).")
    return method.initializer()
