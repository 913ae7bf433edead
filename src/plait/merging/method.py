"""What a merge method is, and finding methods by listing their folder.

A method works in one or more of three spaces:

    factors   on `LowRank`s, exactly: `merge(lows, weights, changes) -> LowRank`
    aligned   entry by entry on coordinates in a basis that the inputs share (KnOTS): the result is
              of low rank, and turning an adapter's factors changes nothing
    delta     entry by entry on dW itself, in blocks of rows: for full checkpoints, or, with a
              truncation at the end, for adapters

The last two are written once, as `survey` (a pass that looks) and `combine` (rows in, rows out).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

from torch import Tensor

from plait.errors import PlaitError, unknown
from plait.linalg import LowRank
from plait.merging.aliases import ALIASES
from plait.merging.changes import Changes
from plait.merging.records import Folder, keywords, make_options

Space = Literal["factors", "aligned", "delta"]


class Merge:
    """One way to merge. Subclasses are dataclasses whose fields are the options."""

    spaces: tuple[Space, ...] = ("factors",)
    """Those that it supports (with these options), the best for adapters first."""
    needs: frozenset[str] = frozenset()
    """What `changes.statistics` must hold: "gram" or "fisher" (see `plait.merging.statistics`), or
    "mask" (`plait.merging.localize`)."""
    reads_base: bool = False
    """Whether it asks for `changes.base_weight()`, so that a base must be given."""

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        """The merge of one site in factors; an input that does not act there comes as rank 0."""
        raise NotImplementedError

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        """What `combine` must know of the whole site: thresholds, norms."""
        return None

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        """The merge [rows, in] of a block [k, rows, in] with weights [k, 1, 1]."""
        raise NotImplementedError


@dataclass(frozen=True)
class MergeMethod:
    """The record that a method's file ends in."""

    name: str
    title: str
    paper: str
    merge: type[Merge]
    whole: Mapping[str, Any] = field(default_factory=dict)
    """Options at which nothing is dropped: copies of one adapter, with weights that add up to 1,
    then return it."""
    symmetric: bool = True
    """The order of the inputs (with their weights) does not matter."""
    inputs: int | None = None
    """How many inputs it takes; None takes any number."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What an alias sets beforehand (see `plait.merging.aliases`)."""


FOLDER = Folder("plait.merging.methods", MergeMethod, "merge method")
SEARCHES: Folder[Any] = Folder("plait.merging.search.methods", object, "search method")
"""Only their names: what they are is `plait.merging.search.method`'s."""


def merge_method_names() -> list[str]:
    """Every merge method's name, sorted."""
    return FOLDER.names()


def get_merge_method(name: str | MergeMethod) -> MergeMethod:
    """The merge method of that name or alias (underscores count as hyphens); an error names the
    nearest, or says that the method is one that searches with data."""
    if isinstance(name, MergeMethod):
        return name
    key = name.lower().replace("_", "-")
    if key in ALIASES:
        meant, options = ALIASES[key]
        return dataclasses.replace(get_merge_method(meant), name=key, options=options)
    if key not in FOLDER.files and key in SEARCHES.files:
        raise PlaitError(
            f"{key} searches its coefficients with data: run `plait search --method {key}`, or "
            "plait.search in Python."
        )
    return FOLDER.get(name, ALIASES)


def make_merge(method: MergeMethod, given: Mapping[str, Any]) -> Merge:
    """The method with its options, `given` over the defaults; an unknown one names the nearest."""
    options = {**method.options, **given}
    return make_options(f"merge method {method.name!r}", method.merge, options, _keywords())


@cache
def _keywords() -> frozenset[str]:
    """Those of the functions that a method's options pass through."""
    from plait.merging import merge, merge_checkpoints

    return keywords(merge, merge_checkpoints)


def choose_space(name: str, way: Merge, wanted: str | None) -> Space:
    """The space to work in; None is the method's best one for adapters."""
    if wanted is None:
        return way.spaces[0]
    for space in get_args(Space):
        if space == wanted and space in way.spaces:
            return space
    if wanted not in get_args(Space):
        raise unknown("space", wanted, get_args(Space))
    raise PlaitError(
        f"merge method {name!r} works in {' or '.join(way.spaces)} with these options, not in "
        f"{wanted!r}."
    )
