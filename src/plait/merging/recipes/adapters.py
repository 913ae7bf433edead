"""Recipes whose models are adapters: the same file gives an adapter, in Plait's spaces.

Weights may differ by layer and by name, as anywhere in recipes; a method's other parameters hold
for the whole adapter. `space`, `rank`, `energy` and `density` are keys of the recipe itself.
"""

from __future__ import annotations

import re
from typing import Any

from plait.adapter import Adapter
from plait.errors import PlaitError
from plait.merging.driver import merge
from plait.merging.recipes.checking import check_names, dialect_of
from plait.merging.recipes.dialect import Made
from plait.merging.recipes.parameters import Parameters
from plait.merging.recipes.references import Shelf
from plait.merging.recipes.schema import Entry, Recipe
from plait.merging.sources import check_adapters, read_sources

_LAYER = re.compile(r"\.(\d+)\.")


def merge_adapters(
    recipe: Recipe, shelf: Shelf, *, seed: int, name: str
) -> tuple[Adapter, tuple[str, ...]]:
    """(the merged adapter, what to know of it); the base model is not read."""
    if recipe.models is None:
        raise PlaitError("slices and modules are of whole models; list adapters under models.")
    dialect = dialect_of(recipe, recipe.space)
    notes = check_names(recipe, dialect)
    base, first = recipe.base_model, dialect.base == "first"
    entries = [entry for entry in recipe.models if first or entry.model != base]
    entries.sort(key=lambda entry: entry.model != base)
    adapters = read_sources([shelf.path(entry.model.model) for entry in entries])
    sites = check_adapters(adapters)
    deepest = max((_layer(path) or 0 for path in sites), default=0)
    made = {
        path: dialect.make(_parameters(recipe, entries, path, deepest, len(site.shape)))
        for path, site in sites.items()
    }
    method, options = _one_way(made, len(adapters))
    weights = [
        {path: made[path].weights[i] for path in sites if path in adapter.deltas}
        for i, adapter in enumerate(adapters)
    ]
    merged = merge(
        adapters,
        method,
        weights,
        space=recipe.space,
        rank=recipe.rank,
        energy=recipe.energy,
        seed=seed,
        name=re.sub(r"[^A-Za-z0-9_\-]", "-", recipe.name or name).strip("-") or "merged",
        **options,
    )
    return merged, tuple(notes)


def _parameters(
    recipe: Recipe, entries: list[Entry], path: str, deepest: int, dims: int
) -> Parameters:
    layer = _layer(path)
    depth = 0.0 if layer is None else layer / deepest if deepest else 1.0
    shared = [recipe.parameters]
    levels = [
        [e.parameters, recipe.input_model_parameters.get(str(e.model), {}), *shared]
        for e in entries
    ]
    labels = [str(e.model) for e in entries]
    name = f"{path}.weight"
    return Parameters(name, [name] * len(entries), labels, levels, shared, depth, dims < 2)


def _one_way(made: dict[str, Made], count: int) -> tuple[str, dict[str, Any]]:
    """The method and the options that all sites share."""
    ways = {m.way for m in made.values()}
    (way, *others) = ways
    if others:
        raise PlaitError(
            "a merge of adapters takes one value of each parameter but weight for all sites; "
            "leave out gradients and filters of the others."
        )
    if way is None:
        raise PlaitError("passthrough copies a model; there is nothing to merge of adapters.")
    if any(m.kept is not None and len(m.kept) < count for m in made.values()):
        raise PlaitError("an adapter of density 0 takes no part; leave it out of the recipe.")
    return way.method, {key: list(v) if isinstance(v, tuple) else v for key, v in way.options}


def _layer(path: str) -> int | None:
    match = _LAYER.search(f"{path}.")
    return None if match is None else int(match[1])
