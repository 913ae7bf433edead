"""One side of a bake-off: a method with what belongs to it, and the recipe that trains it.

    lora   dora:rank=4   pissa+lora-plus:ratio=8   dora+pissa   none   recipe

Pieces are joined by `+`, each with `:option=value` of its own. A rule alone works on the recipe's
method; a start behind a parameterisation replaces that one's own; "none" trains the base itself;
"recipe" is the recipe as it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plait.adapter import get_method
from plait.errors import PlaitError
from plait.training.recipe import Recipe
from plait.training.trainer import make_initializer

AS_IT_STANDS = "recipe"


@dataclass(frozen=True)
class Contender:
    """A method as it enters the bake-off; `label` is its name in tables and folders."""

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    initializer: dict[str, dict[str, Any]] | None = None
    rules: Sequence[dict[str, dict[str, Any]]] = ()

    def recipe(self, shared: Recipe, **changes: Any) -> Recipe:
        """The recipe of one trial: what is shared, and this method's own pieces."""
        if self.label == AS_IT_STANDS:
            return shared.replace(**changes)
        options = {**inherited(shared, self.method), **self.options}
        return shared.replace(
            method=self.method,
            options=options,
            initializer=self.initializer,
            rules=list(self.rules),
            **changes,
        )

    def with_options(self, **options: Any) -> Contender:
        return dataclasses.replace(self, options={**self.options, **options})


def inherited(shared: Recipe, method: str) -> dict[str, Any]:
    """The recipe's options, where its method is this one; another has its own defaults."""
    return dict(shared.options) if shared.method == method else {}


def parse_contenders(words: str | Sequence[str | Contender], shared: Recipe) -> list[Contender]:
    """Contenders from `lora,dora,pissa+lora-plus` or a list; PlaitError for unknown names."""
    given = words.split(",") if isinstance(words, str) else list(words)
    found = [
        w if isinstance(w, Contender) else parse_contender(w.strip(), shared) for w in given if w
    ]
    if not found:
        raise PlaitError("compare: no methods; name them as in lora,dora,pissa.")
    labels = [c.label for c in found]
    for label in labels:
        if labels.count(label) > 1:
            raise PlaitError(f"compare: {label!r} is named twice; name each method once.")
    return found


def parse_contender(text: str, shared: Recipe) -> Contender:
    """One contender, its recipe checked."""
    if text == AS_IT_STANDS:
        return _as_it_stands(shared)
    method: str | None = None
    options: dict[str, Any] = {}
    rules: list[dict[str, Any]] = []
    start: dict[str, dict[str, Any]] | None = None
    for piece in text.split("+"):
        name, given = _piece(piece)
        kind = get_method(name) if name != "none" else None
        if kind is None or (kind.delta is not None and method is None):
            method, options = name if kind is None else kind.name, given
        elif kind.initializer is not None:
            start = {kind.name: given}
        elif kind.rule is not None:
            rules.append({kind.name: given})
        else:
            raise PlaitError(f"compare: {text!r} names two methods, {method!r} and {name!r}.")
    if method is None:
        method = _carrier(rules, shared)
    made = Contender(text, method, options, start, rules)
    made.recipe(shared)  # options are checked here, before anything is loaded
    make_initializer(start)
    return made


def _as_it_stands(shared: Recipe) -> Contender:
    start = shared.initializer
    rules: list[dict[str, Any]] = [{r: {}} if isinstance(r, str) else r for r in shared.rules]
    return Contender(
        AS_IT_STANDS,
        shared.method,
        dict(shared.options),
        {start: {}} if isinstance(start, str) else start,
        rules,
    )


def _carrier(rules: Sequence[dict[str, Any]], shared: Recipe) -> str:
    """What a rule that stands alone works on."""
    kinds = [get_method(next(iter(rule))).rule for rule in rules]
    if kinds and not any(kind is None or kind.needs_adapter for kind in kinds):
        return "none"
    return shared.method if shared.method != "none" else "lora"


def _piece(text: str) -> tuple[str, dict[str, Any]]:
    import yaml

    name, *pairs = text.strip().split(":")
    given = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise PlaitError(f"compare: {text!r}: write options as method:option=value.")
        given[key.strip()] = yaml.safe_load(value)
    return name.strip(), given
