"""AdaMerging: coefficients that make the merged model sure of its answers, without labels.

    min over c of  sum over tasks of  H(p(y | x; W0 + sum_i c_i^l dW_i^l))      H: entropy
    c [k] (task-wise) or [k, layers]; start 0.3, Adam

Unlabelled inputs of all tasks; one batch of each a step. Entropy has trivial minima (one class for
everything): few steps, and a look at the classes predicted. AdaMerging++ is this on trimmed
adapters (`plait.merge([a], "ties", density=0.2)` of each alone, first).
Paper: Yang et al., 2023, arXiv 2310.02575. Adapters stay in eval mode, without dropout.
"""

from __future__ import annotations

from dataclasses import dataclass

from plait.merging.search.found import Found
from plait.merging.search.gradient import descend
from plait.merging.search.groups import Grouping
from plait.merging.search.method import Grouped, SearchMethod
from plait.merging.search.objectives import entropy
from plait.merging.search.problem import Problem


@dataclass
class AdaMerging(Grouped):
    grouping: Grouping = "layer"
    """What shares a coefficient: "adapter" (the paper's task-wise), "layer" (its layer-wise) or
    "site"."""
    start: float = 0.3
    """Coefficient of every adapter at the start (paper: 0.3)."""
    clamp: bool = False
    """Keep coefficients in [0, 1] (the paper does not)."""
    lr: float = 1e-3
    """Adam's learning rate (paper: 1e-3)."""
    steps: int = 500
    """Gradient steps (paper: 500)."""

    wants = "inputs"
    gradient = True

    def find(self, problem: Problem) -> Found:
        bounds = (0.0, 1.0) if self.clamp else None
        space = self.space(problem, start=self.start, bounds=bounds)
        objective = entropy(problem.inputs(), problem.logits, seed=problem.seed)
        return descend(space, objective, steps=self.steps, lr=self.lr, log=problem.log)


METHOD = SearchMethod(
    name="adamerging",
    title="AdaMerging: coefficients of least entropy on unlabelled data",
    paper="Yang et al., 2023, arXiv 2310.02575",
    search=AdaMerging,
)
