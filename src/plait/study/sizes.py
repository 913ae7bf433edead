"""Equal numbers of parameters: each method's rank (or other size) that comes nearest to a budget.

What counts is the method's own formula over the sites that it would take; a module trained beside
the adapter (a head) is the same for all and left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_type_hints

from torch import nn

from plait.adapter import Adapter, Site, detach, find_sites, get_method
from plait.adapter.build import choose_deltas, make_options
from plait.adapter.replacement import find_modules, is_extra
from plait.errors import PlaitError
from plait.study.contender import Contender
from plait.training.dryrun import attach_trial
from plait.training.recipe import Recipe

ATTEMPTS = 24


@dataclass(frozen=True)
class Fit:
    """A size and the count that it gives."""

    options: dict[str, int]
    count: int

    def miss(self, budget: int) -> float:
        """|log(count / budget)|: half is as far as double."""
        return abs(math.log(max(1, self.count) / budget))


def count_parameters(model: nn.Module, recipe: Recipe) -> int:
    """Trained numbers of the recipe's adapter on `model` (of the base, for `method: none`)."""
    if recipe.method == "none":
        return sum(p.numel() for p in model.parameters() if p.is_floating_point())
    adapter = attach_trial(model, recipe)
    try:
        return own_parameters(adapter)
    finally:
        detach(model, adapter.name)


def own_parameters(adapter: Adapter) -> int:
    """Trained numbers without the modules trained beside."""
    beside = sum(p.numel() for d in adapter.deltas.values() if is_extra(d) for p in d.parameters())
    return adapter.num_parameters() - beside


def fit_to_budget(
    model: nn.Module, contender: Contender, shared: Recipe, budget: int
) -> tuple[Contender, int]:
    """(the contender at the size nearest to `budget`, its count).

    Options that the contender was given stay as they are; one whose size cannot be chosen stays.
    Raises PlaitError where the method fits this model at no size.
    """
    recipe = contender.recipe(shared)
    if recipe.method == "none":
        return contender, count_parameters(model, recipe)
    fits, refusal = [], PlaitError(f"{contender.label}: no size fits this model.")
    try:
        fits.append(Fit({}, count_parameters(model, recipe)))
    except PlaitError as error:
        refusal = error  # by default too large for these layers; a smaller one may do
    fits += _candidates(model, contender, recipe)
    for _ in range(min(ATTEMPTS, len(fits))):
        fit = min(fits, key=lambda f: f.miss(budget))
        sized = contender.with_options(**fit.options) if fit.options else contender
        try:
            return sized, count_parameters(model, sized.recipe(shared))
        except (PlaitError, ValueError, RuntimeError):
            fits = [f for f in fits if not _as_large(f, fit)]  # the layers' shapes do not allow it
            if not fits:
                break
    raise refusal


def _as_large(fit: Fit, refused: Fit) -> bool:
    """Whether a size is the refused one, or a rank that is larger still."""
    if fit.options.keys() != refused.options.keys():
        return False
    return fit.options == refused.options or fit.options.get("rank", 0) > refused.options.get(
        "rank", math.inf
    )


def _candidates(model: nn.Module, contender: Contender, recipe: Recipe) -> Iterator[Fit]:
    """Sizes by the method's formula: of the rank, and of other whole numbers if it has none."""
    method = get_method(recipe.method)
    if method.count is None:
        return
    sites = sites_of(model, recipe)
    names = [n for n in _whole_numbers(method.options) if n not in contender.options]
    for name in sorted(names, key=lambda n: n != "rank"):
        found = list(_sizes(method, recipe.options, name, sites))
        yield from found
        if name == "rank" and len({fit.count for fit in found}) > 1:
            return


def sites_of(model: nn.Module, recipe: Recipe) -> list[Site]:
    """The sites that `plait.attach` would take, without attaching."""
    method, targets = get_method(recipe.method), recipe.targets
    sites = None
    if targets is not None or method.choose is None:
        goal = method.targets if targets is None else targets
        which: dict[str, Any] = {"exclude": recipe.exclude, "layers": recipe.layers}
        sites = find_sites(model, goal, kinds=method.kinds, **which)
    chosen = choose_deltas(method, model, sites, make_options(method, recipe.options))
    beside = tuple(f"{path}." for path in find_modules(model, recipe.train_modules))
    return [site for site, _ in chosen if not f"{site.path}.".startswith(beside or "/")]


def _sizes(method: Any, options: dict[str, Any], name: str, sites: list[Any]) -> Iterator[Fit]:
    given = {k: v for k, v in options.items() if k != name}
    # A rank beyond a site's shorter side says nothing that a smaller one does not.
    top = max(min(s.shape[0], s.shape[1]) for s in sites) if name == "rank" else 2**20
    for value in _grid(top):
        try:
            count = method.count(sites, make_options(method, {**given, name: value}))
        except (PlaitError, ValueError, TypeError, ZeroDivisionError):
            continue
        if count > 0:
            yield Fit({name: value}, int(count))


def _grid(top: int) -> Iterator[int]:
    """Every whole number to 256, then steps of 2 %."""
    value = 1
    while value <= top:
        yield value
        value = value + 1 if value < 256 else math.ceil(value * 1.02)


def _whole_numbers(options: type) -> list[str]:
    """Fields that hold a whole number and no seed."""
    hints = get_type_hints(options)
    fields = [f.name for f in dataclasses.fields(options) if f.init and "seed" not in f.name]
    return [n for n in fields if hints[n] is int or hints[n] == (int | None)]
