"""MAP: the Pareto front of several tasks over the adapters' scalings, from few evaluations.

    1. evaluate metrics y_t(c), t = 1..T, at S points c in a box       S = (n + 1)(n + 2) by default
    2. fit each as link(c^T A_t c + b_t^T c + e_t)                     (n + 1)(n + 2) / 2 unknowns
    3. non-dominated points of the surrogates: no further evaluation

for n = k adapters x groups. "bayesian" chooses half of the points that are to spare in rounds,
where the surrogates were most wrong; "nested" merges tasks two by two, adapter i being task i's,
closest metrics first, and then the results two by two: k - 1 fronts, of two numbers each.
Paper: Li et al., 2024, arXiv 2406.07529. Departures: fits begin at linear least squares (the paper:
non-linear from one start); the front stays within the sampled box (the released code leaves it, and
extrapolates); a surrogate's error at a point is that of the fit without it; only bins that hold a
point are drawn; and the front is found by an evolution of our own unless `solver` is "nsga3".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from plait.errors import PlaitError, unknown
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.found import Found
from plait.merging.search.front import Front, checked
from plait.merging.search.groups import Grouping
from plait.merging.search.method import Search, SearchMethod
from plait.merging.search.methods._nested import nested
from plait.merging.search.pareto import Link, Quadratic, Solver, fit_quadratic, front, terms
from plait.merging.search.problem import Metric, Problem
from plait.merging.search.sampling import Box, cover, where_wrong
from plait.merging.search.trials import Trials

Form = Literal["plain", "bayesian", "nested"]


@dataclass
class Map(Search):
    form: Form = "plain"
    """"plain", "bayesian" or "nested"."""
    evaluations: int | None = None
    """S in all; None is twice the unknowns (of "nested": of two numbers, for each of k - 1 pairs,
    and one for each adapter)."""
    preference: Sequence[float] | None = None
    """A weight for each task, by which one point is chosen; None weighs them alike."""
    box: Box = (0.0, 1.0)
    """Least and greatest coefficient, of what is sampled and of the front."""
    link: Link = "identity"
    """"sigmoid" for accuracies, "softplus" for numbers above 0."""
    edge: float = 1e-3
    """Accuracies are kept this far from 0 and 1 (half an example is a good choice)."""
    grouping: Grouping = "adapter"
    """What shares a coefficient."""
    size: int = 100
    """The most points that the front has (paper: 100)."""
    solver: Solver = "own"
    """"own", or "nsga3" (paper) of the package pymoo (extra `search`)."""
    rounds: int = 3
    """"bayesian": times that points are chosen."""
    bins: int = 4
    """"bayesian": parts that each angle is cut into."""
    explore: float = 0.5
    """"bayesian": weight of the errors' deviation beside their mean."""
    temperature: float = 0.07
    """"bayesian": of the choice among bins (paper: 0.07)."""

    wants = "metrics"

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise unknown("form", self.form, get_args(Form))
        if len(self.box) != 2 or not self.box[0] < self.box[1]:
            raise PlaitError(f"map: box is (least, greatest), not {self.box}.")
        if self.rounds < 1 or self.bins < 1 or self.temperature <= 0 or self.size < 2:
            raise PlaitError("map: rounds and bins of at least 1, temperature above 0, size 2.")
        self.box = (float(self.box[0]), float(self.box[1]))
        self.packages = ("pymoo",) if self.solver == "nsga3" else ()

    def within(self, evaluations: int) -> Map:
        return dataclasses.replace(self, evaluations=evaluations)

    def find(self, problem: Problem) -> Found:
        """The front's point that is preferred; all of it is `found.front`."""
        space = Coefficients(
            problem.model, problem.names, grouping=self.grouping, start=self.box[0], bounds=self.box
        )
        metrics = problem.measured()
        checked(self.preference, len(metrics))
        if self.form == "nested":
            return nested(self, space, problem)
        n = space.shape[0] * space.shape[1]
        count = 2 * terms(n) if self.evaluations is None else self.evaluations
        if count < terms(n):
            raise PlaitError(
                f"map: {n} coefficients need at least {terms(n)} evaluations, not {count}."
            )
        search = self.described(space, problem)
        if self.form == "bayesian":  # what is asked first depends on how much there is in all
            search["evaluations"] = count
        trace = problem.log.open(search, count, "map")
        with space.searching(), torch.no_grad(), trace as trials:
            points = self._first(n, count, problem.seed)
            values = measure(space, points.reshape(-1, *space.shape), metrics, trials)
            if self.form == "bayesian":
                points, values = self._chosen(space, points, values, count, problem, trials)
        surrogates = self.fit(points, values)
        found = self.front(surrogates, n, problem.seed)
        made = Front(
            space,
            list(metrics),
            found.reshape(-1, *space.shape),
            torch.stack([surrogate(found) for surrogate in surrogates], 1),
            surrogates,
            values,
            trials.history,
        )
        return made.choose(self.preference)

    def described(self, space: Coefficients, problem: Problem) -> dict[str, Any]:
        names = ["form", "box"]
        if self.form == "bayesian":
            names += ["link", "edge", "rounds", "bins", "explore", "temperature"]
        facts = {name: getattr(self, name) for name in names}
        tasks = list(problem.measured())
        return space.described() | facts | {"search": "map", "seed": problem.seed, "tasks": tasks}

    def _first(self, n: int, count: int, seed: int) -> Tensor:
        first = terms(n) + (count - terms(n) + 1) // 2 if self.form == "bayesian" else count
        return cover(n, first, self.box, seed)

    def _chosen(
        self,
        space: Coefficients,
        points: Tensor,
        values: Tensor,
        count: int,
        problem: Problem,
        trials: Trials,
    ) -> tuple[Tensor, Tensor]:
        """The points with those that the surrogates' errors ask for, up to `count`."""
        draw = torch.Generator().manual_seed(problem.seed)
        for left in range(self.rounds, 0, -1):
            new = (count - len(points)) // left
            if new == 0:
                continue
            errors = torch.stack([s.errors for s in self.fit(points, values)], 1).square()
            more = where_wrong(
                points,
                errors,
                new,
                self.box,
                draw,
                bins=self.bins,
                explore=self.explore,
                temperature=self.temperature,
            )
            there = more.reshape(-1, *space.shape)
            values = torch.cat([values, measure(space, there, problem.measured(), trials)])
            points = torch.cat([points, more])
        return points, values

    def fit(self, points: Tensor, values: Tensor) -> list[Quadratic]:
        return [fit_quadratic(points, v, self.link, edge=self.edge) for v in values.T]

    def front(self, surrogates: Sequence[Quadratic], n: int, seed: int) -> Tensor:
        edges = torch.full((n,), self.box[0]).double(), torch.full((n,), self.box[1]).double()
        return front(surrogates, edges, size=self.size, solver=self.solver, seed=seed)


def measure(
    space: Coefficients, points: Tensor, metrics: Mapping[str, Metric], trials: Trials
) -> Tensor:
    """[S, T] at points [S, k, g]."""
    rows = []
    for c in points:

        def ask(c: Tensor = c) -> dict[str, Any]:
            space.use(c)
            return {"metrics": {name: float(m(space.model)) for name, m in metrics.items()}}

        rows.append(list(trials(c, ask)["metrics"].values()))
    return torch.tensor(rows, dtype=torch.float64)


METHOD = SearchMethod(
    name="map",
    title="MAP: Pareto fronts of several tasks from a few evaluations",
    paper="Li et al., 2024, arXiv 2406.07529",
    search=Map,
)
