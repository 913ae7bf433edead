"""TIES: trim each change to its largest entries, elect a sign an entry, merge those that agree.

    1 trim      the largest `density` of |dW_i| stay                     (a site at a time)
    2 elect     sign of sum_i w_i dW_i at every entry, of what stayed
    3 merge     the weighted mean of the entries with that sign

In the default space the entries are coordinates in a basis that the adapters share, so the result
is of low rank and does not depend on how an adapter's factors are turned; in `delta` they are those
of dW, as in the paper, and the result is of full rank until it is cut. Weights count before the
election, and the mean is over the weights of those that agree.
Paper: Yadav et al., 2023, arXiv 2306.01708. Departure: trimming by site, not over the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plait.adapter.choices import check_choices
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod
from plait.merging.methods._election import Reduce, Sign, elect
from plait.merging.methods._trim import check_density, keep_from, thresholds


@dataclass
class Ties(Merge):
    density: float | Sequence[float] = 0.2
    """Share of the entries that stay (paper: 0.2), or one for each input."""
    sign: Sign = "sum"
    """Elect by mass, or by the number of changes on either side."""
    reduce: Reduce = "mean"
    """Of those that agree: their weighted mean (paper), their sum, or the largest."""
    scale: float = 1.0
    """Factor on the result (the paper's lambda: 0.3 to 1)."""

    spaces = ("aligned", "delta")

    def __post_init__(self) -> None:
        check_density("ties", self.density)
        check_choices(self, "ties")

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        return thresholds(changes, self.density)

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        return self.scale * elect(keep_from(block, found), weights, self.sign, self.reduce)


METHOD = MergeMethod(
    name="ties",
    title="TIES: trim, elect signs, merge what agrees",
    paper="Yadav et al., 2023, arXiv 2306.01708",
    merge=Ties,
    whole={"density": 1.0},
)
