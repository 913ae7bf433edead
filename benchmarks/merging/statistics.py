"""What data says about each expert, for the merges that ask: Grams and Fisher diagonals.

From the first training rows of each task. The experts are attached for the time it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from benchmarks.merging.scorer import batches

import plait
from plait.merging.statistics import fisher, gram

if TYPE_CHECKING:
    from benchmarks.merging.bench import Bench

ROWS = {"gram": 96, "fisher": 24}
"""Of each task; a Fisher diagonal takes a backward pass a row."""

Known = list[dict[str, Any]]


def of(bench: Bench, needs: frozenset[str]) -> Known | None:
    """For each expert {site path: tensor}, kept on the bench; None where nothing is needed."""
    if not needs:
        return None
    (kind,) = needs
    kept: dict[str, Known] = bench.__dict__.setdefault("_statistics", {})
    if kind not in kept:
        kept[kind] = _collect(bench, kind)
    return kept[kind]


def _collect(bench: Bench, kind: str) -> Known:
    if kind not in ROWS:
        raise ValueError(f"the benchmark knows no statistics of kind {kind!r}")
    with attached(bench) as names:
        found = []
        for name in names:
            here = batches(bench.rows[name][: ROWS[kind]])
            if kind == "gram":
                found.append(gram(bench.scorer, name, here, among=names))
            else:
                # An expert that fits its rows has no gradients left, and would not count at all.
                found.append(fisher(bench.scorer, name, here, among=names, normalize=True))
    return found


@contextmanager
def attached(bench: Bench) -> Iterator[list[str]]:
    """The experts on the scorer, by their names; afterwards none is."""
    known: list[str] = []
    try:
        for adapter in bench.experts:
            folder = bench.recipe.folder(adapter.name, bench.runs)
            plait.load(bench.scorer, folder / "adapter", name=adapter.name)
            known.append(adapter.name)
        yield known
    finally:
        for name in known:
            plait.detach(bench.scorer, name)
