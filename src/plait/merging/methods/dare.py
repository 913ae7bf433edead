"""DARE: drop entries of every change at random, rescale the rest, and add up.

    dW~_i = m * dW_i / density      m ~ Bernoulli(density) an entry      dW = sum_i w_i dW~_i

Unbiased, with a relative error of sqrt((1 - density) / density). In the default space each adapter
is brought into its singular form first, and the entries of A alone are dropped: the result is of
low rank, and its error is that of dropping entries of dW (masks on A and on B at once would give
up to 1 / density times that). `delta` drops entries of dW itself, as in the paper. `elect` merges
what is left as TIES does (DARE-TIES).
Which entries go depends on the seed, the site, the adapter's place and the position alone.
Paper: Yu et al., 2024, arXiv 2311.03099.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter.choices import check_choices
from plait.linalg import LowRank, key_of, uniform_at
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod
from plait.merging.methods._election import Reduce, elect
from plait.merging.methods._trim import check_density, densities


@dataclass
class Dare(Merge):
    density: float | Sequence[float] = 0.5
    """Share of the entries that stay (paper: 0.1 to 0.8), or one for each input."""
    rescale: Literal["inverse", "l1", "none"] = "inverse"
    """Divide what stays by the density (paper), by what restores the sum of |dW_i|, or by 1."""
    elect: bool = False
    """Elect signs and merge what agrees, as TIES; not in space `factors`."""
    reduce: Reduce = "mean"
    """With `elect`, of those that agree: their weighted mean, their sum, or the largest."""
    scale: float = 1.0
    """Factor on the result."""

    spaces = ("factors", "aligned", "delta")

    def __post_init__(self) -> None:
        check_density("dare", self.density)
        check_choices(self, "dare")
        if self.elect:
            self.spaces = ("aligned", "delta")  # type: ignore[assignment]

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        dropped, shares = [], densities(changes, self.density)
        for i, (low, density) in enumerate(zip(lows, shares, strict=True)):
            singular = low.balanced()
            key = key_of(changes.seed, changes.path, "dare", i)
            numbers = uniform_at(key, range(singular.rank), singular.shape[-1])
            A = singular.A * (numbers < density)
            dropped.append(LowRank(singular.B, A * self._factor(singular.A, A, density)))
        return LowRank.weighted_sum(dropped, [self.scale * w for w in weights])

    def _factor(self, before: Tensor, after: Tensor, density: float) -> float:
        if self.rescale != "l1":
            return 1 / density if self.rescale == "inverse" else 1.0
        left = float(after.abs().sum())
        return float(before.abs().sum()) / left if left else 1.0

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        """Each input's share of entries that stay, and the factor on them, [k, 1, 1] both."""
        wide = torch.tensor(densities(changes, self.density), dtype=torch.float64)[:, None, None]
        shares = wide.float()  # as the random numbers are
        if self.rescale != "l1":
            return shares, 1 / wide if self.rescale == "inverse" else torch.ones_like(wide)
        total, left = torch.zeros(2, changes.k, dtype=torch.float64)
        for rows in changes.ranges():
            sizes = changes.rows(rows).abs().double()
            total += sizes.sum((1, 2))
            left += (sizes * (changes.uniform("dare", rows) < shares)).sum((1, 2))
        # What stays can be 0 throughout: bfloat16 changes often are, and vectors are short.
        factors = torch.where(left > 0, total / left.clamp_min(1e-300), 1.0)
        return shares, factors[:, None, None]

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        shares, factors = found
        kept = torch.where(changes.uniform("dare", rows) < shares, block * factors.to(block), 0)
        if self.elect:
            return self.scale * elect(kept, weights, reduce=self.reduce)
        return self.scale * (weights * kept).sum(0)


METHOD = MergeMethod(
    name="dare",
    title="DARE: drop entries at random and rescale",
    paper="Yu et al., 2024, arXiv 2311.03099",
    merge=Dare,
    whole={"density": 1.0},
    symmetric=False,
)
