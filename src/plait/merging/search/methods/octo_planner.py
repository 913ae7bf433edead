"""Octo-planner's merge: adapters of several function sets added with one common weight.

    W = W0 + lambda sum_i dW_i,   lambda swept over a few values on queries that need several sets

Equal weights 1 / k starve every skill and weights of 1 overshoot, so the sweep is the method; an
`optimizer` then tunes a weight for each adapter from there. Ranks may differ.
Paper: Chen et al., 2024, arXiv 2406.18082 (which merges with weights that it leaves open).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.derivative_free import Optimizer, minimise, packages_of
from plait.merging.search.found import Found
from plait.merging.search.method import Search, SearchMethod
from plait.merging.search.problem import Problem

SWEPT = 8


@dataclass
class OctoPlanner(Search):
    lambdas: Sequence[float] | None = None
    """Common weights tried; None is eight steps from 1 / k to 1."""
    tune: int = 0
    """Evaluations of a weight for each adapter after the sweep."""
    optimizer: Optimizer = "nelder-mead"
    """Of the tuning: "nelder-mead" or "cma" (extra `search`), or "random"."""

    def __post_init__(self) -> None:
        if self.tune < 0 or (self.lambdas is not None and not list(self.lambdas)):
            raise PlaitError("octo-planner: give at least one lambda, and tune of at least 0.")
        self.packages = packages_of(self.optimizer) if self.tune else ()

    def within(self, evaluations: int) -> OctoPlanner:
        swept = SWEPT if self.lambdas is None else len(self.lambdas)
        if evaluations < swept:
            raise PlaitError(
                f"octo-planner: a budget of {evaluations} evaluations, for {swept} lambdas alone; "
                "raise it or give fewer lambdas."
            )
        return dataclasses.replace(self, tune=evaluations - swept)

    def find(self, problem: Problem) -> Found:
        space, objective = Coefficients(problem.model, problem.names), problem.lowered()
        tried = self.lambdas
        if tried is None:
            tried = torch.linspace(1 / len(problem.names), 1, SWEPT).tolist()
        search = space.described() | {"search": "octo-planner", "lambdas": list(tried)}
        trace = problem.log.open(search, len(tried), "octo-planner")
        with space.searching(), torch.no_grad(), trace as trials:
            for value in tried:
                c = torch.full(space.shape, value, dtype=torch.float64)

                def ask(c: Tensor = c) -> dict[str, float]:
                    space.use(c)
                    return {"value": float(objective(problem.model, 0))}

                trials(c, ask)
        best = min(trials.history, key=lambda entry: entry["value"])
        common = torch.tensor(best["point"], dtype=torch.float64)
        if not self.tune:
            return Found(space, common, best["value"], trials.history)
        found = minimise(
            Coefficients(problem.model, problem.names, start=common),
            objective,
            evaluations=self.tune,
            optimizer=self.optimizer,
            spread=0.1,
            seed=problem.seed,
            log=problem.log.next(),
        )
        return dataclasses.replace(found, history=trials.history + found.history)


METHOD = SearchMethod(
    name="octo-planner",
    title="Octo-planner: adapters of function sets under one swept weight",
    paper="Chen et al., 2024, arXiv 2406.18082",
    search=OctoPlanner,
)
