"""WUDI: the change that acts as every input's own on that input's row space, without data.

    min over dW of  sum_i m_i |(dW - dW_i) dW_i^T|^2 / |dW_i|^2        m_i = k w_i / sum of the w

The rows of dW_i stand for what task i's inputs look like (a weight moves only along the inputs it
saw in training): RegMean with dW_i^T dW_i in place of a Gram matrix of data. From the sum of the
changes on, gradient flow runs for `time`, by which strong directions settle and weak ones keep the
sum (see `plait.merging.methods._quadratic`). Inputs of independent row spaces come out with a loss
of 0 at the minimum: dW acts as each of them on its own. But where row spaces nearly coincide, as of
adapters from one start of A, that minimum is huge, which is why the flow stops.
Exact in factors, in the order of R^3 for R the sum of the ranks.
Papers: Cheng et al., 2025, arXiv 2503.08099 (300 steps of Adam at 1e-5: solver "adam"); its
spectral form, SWUDI, is `keep` 0.65 (0.85 for fully trained language models), and ASWUDI solver
"exact" with keep "adaptive" (Wei et al., 2025, arXiv 2505.19892, released code). Departures: the
flow is the default; shares of directions are of those that are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from plait.merging.method import MergeMethod
from plait.merging.methods._quadratic import QuadraticMerge


@dataclass
class Wudi(QuadraticMerge):
    start: Literal["sum", "mean"] = "sum"
    """Where the solver starts, and what directions that do not settle keep: sum_i m_i dW_i (paper)
    or the weighted mean."""

    @property
    def from_sum(self) -> bool:
        return self.start == "sum"

    def term(self, change: Tensor, mean: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        return change, change


METHOD = MergeMethod(
    name="wudi",
    title="WUDI: acts as each input on its own row space",
    paper="Cheng et al., 2025, arXiv 2503.08099",
    merge=Wudi,
    whole={"solver": "exact"},
)
