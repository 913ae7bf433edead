"""FW-Merging: Frank-Wolfe over the convex hull of a pool of adapters, some of them irrelevant.

    theta_{t+1} = (1 - gamma) theta_t + gamma v,   v = argmin over the hull's vertices of <g, v>
    g = gradient of the tasks' mean loss at theta_t, gamma = step_size * 2 / (t + 2)

theta is held as coefficients: <g, dW_s> is the gradient of coefficient s, so one backward through
the active adapters answers for the whole pool and no gradient of W is formed. Irrelevant adapters
are not picked.
Paper: Chen et al., 2025, arXiv 2503.12649 (its hard variant). Departures: inner products are of
changes, where the released code takes cosines of whole checkpoints, base included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plait.errors import unknown
from plait.merging.search.found import Found
from plait.merging.search.frank_wolfe import Oracle, frank_wolfe
from plait.merging.search.groups import Grouping
from plait.merging.search.method import Grouped, SearchMethod
from plait.merging.search.objectives import entropy
from plait.merging.search.problem import Problem


@dataclass
class FwMerging(Grouped):
    steps: int = 10
    """Steps, each towards one adapter (paper: 10)."""
    step_size: float = 1.0
    """Share of the classical step (paper: 1 for language models, 0.1 for vision)."""
    scale: float = 1.0
    """Factor on the hull, task arithmetic's lambda."""
    oracle: Oracle = "whole"
    """"whole": one adapter a step; "group": one for each group, with grouping "layer" or "site"."""
    grouping: Grouping = "adapter"
    """What shares a coefficient: "adapter", "layer" or "site"."""
    start: float = 0.0
    """Coefficient of every adapter at the start; 0 is the base, 1 / k the mean."""
    base: bool = True
    """Whether the base itself is in the pool."""
    lowers: Literal["loss", "entropy"] = "loss"
    """"loss" of labelled rows, or "entropy" of the answers to unlabelled ones."""

    gradient = True

    def __post_init__(self) -> None:
        if self.lowers not in ("loss", "entropy"):
            raise unknown("option value", self.lowers, ("loss", "entropy"))
        self.wants = "loss" if self.lowers == "loss" else "inputs"

    def find(self, problem: Problem) -> Found:
        objective = (
            problem.lowered()
            if self.lowers == "loss"
            else entropy(problem.inputs(), problem.logits, seed=problem.seed)
        )
        return frank_wolfe(
            self.space(problem, start=self.start),
            objective,
            steps=self.steps,
            step_size=self.step_size,
            scale=self.scale,
            oracle=self.oracle,
            base=self.base,
            log=problem.log,
        )


METHOD = SearchMethod(
    name="fw-merging",
    title="FW-Merging: Frank-Wolfe over a pool of adapters",
    paper="Chen et al., 2025, arXiv 2503.12649",
    search=FwMerging,
)
