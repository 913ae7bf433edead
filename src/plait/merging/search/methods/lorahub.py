"""LoraHub: weights of many adapters for a new task, from a handful of examples, without gradients.

    min over w in [-1.5, 1.5]^k of  loss(few examples; W0 + sum_i w_i dW_i) + 0.05 mean |w_i|

From w = 0 and in 40 evaluations, as in the paper. Departures: changes are added, where the paper
adds the As and the Bs apart (which mixes terms B_i A_j, needs equal ranks, and depends on how an
adapter's factors happen to be turned); Nelder-Mead or CMA-ES in place of nevergrad's NGOpt; or, as
the sum is differentiable, `optimizer="gradient"`.
Paper: Huang et al., 2023, arXiv 2307.13269.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from plait.errors import PlaitError
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.derivative_free import minimise, packages_of
from plait.merging.search.found import Found
from plait.merging.search.gradient import descend
from plait.merging.search.method import Search, SearchMethod
from plait.merging.search.problem import Problem


@dataclass
class LoraHub(Search):
    optimizer: Literal["nelder-mead", "cma", "random", "gradient"] = "cma"
    """"cma" and "nelder-mead" (extra `search`), "random" or "gradient"."""
    evaluations: int = 40
    """Of all examples together, the start's included (paper: 40)."""
    bound: float = 1.5
    """Greatest size of a weight (paper: 1.5)."""
    l1: float = 0.05
    """Of the weights' mean size in what is lowered (paper: 0.05)."""
    spread: float = 0.5
    """First steps of the searches without gradients."""
    lr: float = 0.05
    """Learning rate of "gradient"."""

    def __post_init__(self) -> None:
        if self.evaluations < 2 or self.bound <= 0 or self.l1 < 0:
            raise PlaitError("lorahub: evaluations at least 2, bound above 0, l1 at least 0.")
        self.gradient = self.optimizer == "gradient"
        if self.optimizer != "gradient":
            self.packages = packages_of(self.optimizer)

    def find(self, problem: Problem) -> Found:
        bounds = (-self.bound, self.bound)
        space = Coefficients(problem.model, problem.names, start=0.0, bounds=bounds)
        objective = problem.lowered()

        def penalty(c: Tensor) -> Tensor:
            return self.l1 * c.abs().mean()

        common: dict[str, Any] = {"penalty": penalty, "log": problem.log}
        if self.optimizer == "gradient":
            steps = self.evaluations - 1
            return descend(space, objective, steps=steps, lr=self.lr, keep="best", **common)
        return minimise(
            space,
            objective,
            evaluations=self.evaluations,
            optimizer=self.optimizer,
            spread=self.spread,
            seed=problem.seed,
            **common,
        )


METHOD = SearchMethod(
    name="lorahub",
    title="LoraHub: adapters' weights for a new task from a few examples",
    paper="Huang et al., 2023, arXiv 2307.13269",
    search=LoraHub,
)
