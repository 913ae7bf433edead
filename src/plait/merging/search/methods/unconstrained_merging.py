"""Unconstrained merging, of models of one architecture: merge options by depth, found by CMA-ES.

    phi = {w_i^l, d_i^l}: a weight (and a density) for each adapter i and group l of layers
    merge by task arithmetic, TIES or DARE-TIES at those      maximise the score on a few examples

With task arithmetic a point is only weights of the active adapters; the others merge anew at every
point. A search over many numbers fits the few examples that it sees: keep others to judge by.
The half for other architectures and tokenizers is `plait.transfer.fuse` with the rule `distil`.
Paper: Zhang et al., 2024, arXiv 2410.13699. Population, groups and bounds are ours: it says little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from plait.adapter import adapters
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.derivative_free import Optimizer, minimise, packages_of
from plait.merging.search.found import Found
from plait.merging.search.groups import layer_of
from plait.merging.search.merged import FoundMerge, MergedSpace
from plait.merging.search.method import Search, SearchMethod
from plait.merging.search.problem import Problem


@dataclass
class UnconstrainedMerging(Search):
    inner: Literal["task-arithmetic", "ties", "dare-ties"] = "task-arithmetic"
    """The merge; the last two also search densities."""
    groups: int = 8
    """Runs of layers of nearly equal length, with numbers of their own (1: all layers alike)."""
    evaluations: int = 100
    """Of what is lowered, the start's included."""
    optimizer: Optimizer = "cma"
    """"cma" or "nelder-mead" (extra `search`), or "random"."""
    spread: float = 0.2
    """Standard deviation of the first points."""
    start: float | None = None
    """Of the weights; None is 1 / k."""
    least: float = 0.0
    """Of a weight."""
    most: float = 1.0
    """Of a weight."""
    density: float = 0.5
    """Of each input at the start."""
    least_density: float = 0.1
    """Least density tried; the greatest is 1."""
    options: Mapping[str, Any] = field(default_factory=lambda: {"reduce": "sum"})
    """Others of the inner merge; by default what agrees adds up, so that weights set its size."""

    def __post_init__(self) -> None:
        check_choices(self, "unconstrained-merging")
        if self.groups < 1 or self.evaluations < 2:
            raise PlaitError("unconstrained-merging: groups from 1, evaluations from 2 up.")
        self.packages = packages_of(self.optimizer)

    def find(self, problem: Problem) -> Found:
        space = self._space(problem)
        found = minimise(
            space,
            problem.lowered(),
            evaluations=self.evaluations,
            optimizer=self.optimizer,
            spread=self.spread * (self.most - self.least),
            seed=problem.seed,
            log=problem.log,
        )
        if not isinstance(space, MergedSpace):
            return found
        facts = {"merge": space.arguments(found.coefficients)}
        return FoundMerge(space, found.coefficients, found.value, found.history, facts)

    def _space(self, problem: Problem) -> Coefficients:
        known = adapters(problem.model)
        paths = [path for name in problem.names if name in known for path in known[name].deltas]
        common: dict[str, Any] = {
            "grouping": by_depth(paths, self.groups),
            "bounds": (self.least, self.most),
            "start": self.start,
        }
        if self.inner == "task-arithmetic":
            return Coefficients(problem.model, problem.names, **common)
        return MergedSpace(
            problem.model,
            problem.names,
            self.inner,
            density=self.density,
            least=self.least_density,
            options=self.options,
            seed=problem.seed,
            **common,
        )


def by_depth(paths: Sequence[str], count: int) -> Callable[[str], str]:
    """A group for every path: `count` runs of layers, in the order in which they are named."""
    layers = list(dict.fromkeys(layer_of(path) for path in paths))
    count = min(count, len(layers))
    runs: dict[int, list[str]] = {}
    for i, layer in enumerate(layers):
        runs.setdefault(i * count // len(layers), []).append(layer)
    named = {
        layer: run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}"
        for run in runs.values()
        for layer in run
    }
    return lambda path: named[layer_of(path)]


METHOD = SearchMethod(
    name="unconstrained-merging",
    title="Unconstrained merging: weights and densities by depth, by evolution",
    paper="Zhang et al., 2024, arXiv 2410.13699",
    search=UnconstrainedMerging,
)
