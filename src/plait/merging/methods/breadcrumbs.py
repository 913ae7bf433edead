"""Breadcrumbs: leave out the largest and the smallest entries of every change, then add up.

    N entries of dW_i by magnitude:  [ smallest, dropped | density N, kept | gamma N, dropped ]
    dW = scale * sum_i w_i dW~_i           (or TIES' election and mean of them, with `elect`)

The outliers go because a few huge entries of one task disturb all others. Sites of fewer than
1 / gamma entries have no outliers to lose; where density and gamma add up to more than 1, fewer
outliers go. In the default space the entries are coordinates in a basis that the adapters share, so
that the result is of low rank; in `delta` they are those of dW, as in the paper.
Paper: Davari and Belilovsky, 2023, arXiv 2312.06795. Departure: entries as large as the threshold
all stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod
from plait.merging.methods._election import Reduce, elect
from plait.merging.methods._trim import check_density, count_of, densities, kth


@dataclass
class Breadcrumbs(Merge):
    density: float | Sequence[float] = 0.9
    """Share of the entries that stay (paper: 0.85 to 0.9), or one for each input."""
    gamma: float | Sequence[float] = 0.01
    """Share of the entries, the largest, that go (paper: 0.01), or one for each input."""
    elect: bool = False
    """Elect signs and merge what agrees, as TIES; else the weighted sum (paper)."""
    reduce: Reduce = "mean"
    """With `elect`, of those that agree: their weighted mean, their sum, or the largest."""
    scale: float = 1.0
    """Factor on the result (paper: 0.3 on the sum of tasks)."""

    spaces = ("aligned", "delta")

    def __post_init__(self) -> None:
        check_density("breadcrumbs", self.density)
        check_choices(self, "breadcrumbs")
        for share in self.gamma if isinstance(self.gamma, Sequence) else [self.gamma]:
            if not 0 <= share < 1:
                raise PlaitError(f"breadcrumbs: gamma is a share in [0, 1), not {share}.")

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        """The least and the greatest magnitude that stay, [k, 1, 1] each."""
        total = math.prod(changes.shape)
        kept = [count_of(changes, share) for share in densities(changes, self.density)]
        outliers = [
            min(math.floor(gamma * total + 1e-6), total - count)
            for gamma, count in zip(densities(changes, self.gamma), kept, strict=True)
        ]
        least = kth(changes, [a + b for a, b in zip(kept, outliers, strict=True)])
        return least, kth(changes, [count + 1 for count in outliers])

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        least, greatest = found
        size = block.abs().float()  # compared as the thresholds were found
        kept = torch.where((size >= least) & (size <= greatest), block, 0)
        if self.elect:
            return self.scale * elect(kept, weights, reduce=self.reduce)
        return self.scale * (weights * kept).sum(0)


METHOD = MergeMethod(
    name="breadcrumbs",
    title="Breadcrumbs: neither the largest nor the smallest entries",
    paper="Davari and Belilovsky, 2023, arXiv 2312.06795",
    merge=Breadcrumbs,
    whole={"density": 1.0, "gamma": 0.0},
)
