"""Plait's own merge methods in recipes: `method: ties`, with the method's options as parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from plait.merging.method import MergeMethod, choose_space, get_merge_method, make_merge
from plait.merging.recipes.dialect import Dialect, Made, way
from plait.merging.recipes.parameters import Parameters
from plait.merging.recipes.values import Scalar


def native(name: str, space: str | None = "delta") -> Dialect:
    """The method of that name (an unknown one names the nearest) as recipes use it.

    Its options are those of `plait methods NAME`; one that is given for single models becomes a
    list. Weights are 1 / k where none is given. Changes are those from base_model, where there is
    one.
    """
    method = get_merge_method(name)
    fields = {f.name: str(f.type) for f in dataclasses.fields(method.merge)}  # type: ignore[arg-type]

    def make(p: Parameters) -> Made:
        options: dict[str, Any] = {}
        for option, kind in fields.items():
            alone = [p.has(option, i) for i in range(p.count)]
            shared = p.value(option)
            if shared is not None:
                options[option] = _typed(shared, kind)
            elif any(alone):
                options[option] = [_typed(v, kind) for v in p.numbers(option)]
        _checked(method, options, space)
        return Made(way(method.name, **options), tuple(p.numbers("weight", 1 / p.count)))

    known = frozenset(fields)
    count = method.inputs
    return Dialect("optional", make, known | {"weight"}, known, least=count or 1, most=count)


def _checked(method: MergeMethod, options: dict[str, Any], space: str | None) -> None:
    choose_space(method.name, make_merge(method, options), space)


def _typed(value: Scalar, kind: str) -> Any:
    """Numbers of recipes are floats; options that count want whole ones."""
    whole = "int" in kind and "float" not in kind
    return int(value) if whole and isinstance(value, float) and value.is_integer() else value
