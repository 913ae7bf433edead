"""Layered: one merge method with other options at other sites.

    site ──► the first of `sites` whose pattern fits ──► inner method with `options` and its own

Layers differ in how much of a change they need, so densities and thresholds may follow the depth
(weights already may: {site path: weight}). It is what searches over layers end in, and how
mergekit's values by layer are said here.
Paper: none of its own; see unconstrained merging, Zhang et al., 2024, arXiv 2410.13699.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from plait.adapter.build import site_matches
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod, get_merge_method, make_merge


@dataclass
class Layered(Merge):
    inner: str = "ties"
    """The method."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its options wherever no pattern says otherwise."""
    sites: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """{pattern: options there, over the others}; a pattern is a path, its ending, or a regular
    expression of its ending, and the first that fits counts."""

    def __post_init__(self) -> None:
        method = get_merge_method(self.inner)
        if method.merge is Layered:
            raise PlaitError("layered: the inner method must be another one.")
        self._rest = make_merge(method, self.options)
        self._ways = {
            pattern: make_merge(method, {**self.options, **given})
            for pattern, given in self.sites.items()
        }
        every = [self._rest, *self._ways.values()]
        self.spaces = tuple(s for s in self._rest.spaces if all(s in w.spaces for w in every))
        self.needs = frozenset().union(*(way.needs for way in every))
        self.reads_base = any(way.reads_base for way in every)

    def way(self, path: str) -> Merge:
        """The method at a site (or at its bias)."""
        site = path.removesuffix(".bias")
        if site in self._ways:
            return self._ways[site]
        fitting = (way for p, way in self._ways.items() if site_matches(p, site))
        return next(fitting, self._rest)

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        return self.way(changes.path).merge(lows, weights, changes)

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        return self.way(changes.path).survey(changes, weights)

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        return self.way(changes.path).combine(block, rows, weights, changes, found)


METHOD = MergeMethod(
    name="layered",
    title="Layered: one method with other options at other sites",
    paper="Zhang et al., 2024, arXiv 2410.13699",
    merge=Layered,
    whole={"options": {"density": 1.0}},
)
