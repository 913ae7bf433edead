"""DELLA: as DARE, but an entry's chance to stay grows with its rank in its row by magnitude.

    u = rank of |dW_i[a, b]| in row a, from 0 (smallest) to 1       q = density - eps + 2 eps u
    dW~_i = m * dW_i / q      m ~ Bernoulli(q)      dW = TIES' election and mean of the w_i dW~_i

Unbiased entry by entry with the default rescaling. `elect=False` adds up what is left instead
(della_linear); then the default space is `factors`: each adapter is brought into its singular form
and the rows of A are sampled, which keeps the result of low rank. Which entries go depends on the
seed, the site, the adapter's place and the position alone.
Paper: Deep et al., 2024, arXiv 2406.11617.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.linalg import LowRank, key_of, uniform_at
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod
from plait.merging.methods._election import elect
from plait.merging.methods._trim import check_density


def chances(block: Tensor, density: float, epsilon: float) -> Tensor:
    """q [..., rows, in] of a block's entries; the mean over each row is the density."""
    columns = block.shape[-1]
    # Ranks are counted in whole numbers: half types cannot tell more than 256 of them apart.
    rank = block.abs().argsort(dim=-1, stable=True).argsort(dim=-1)
    u = rank.to(block.dtype) / (columns - 1) if columns > 1 else torch.full_like(block, 0.5)
    return density - epsilon + 2 * epsilon * u


@dataclass
class Della(Merge):
    density: float = 0.5
    """Share of the entries that stay (paper: 0.1 to 0.7)."""
    epsilon: float = 0.15
    """Half of the span of the chances in a row (paper: 0.07 to 0.15); 0 is DARE's one chance."""
    rescale: Literal["inverse", "l1", "none"] = "inverse"
    """Divide what stays by its chance (paper), by what restores the sum of |dW_i|, or by 1."""
    elect: bool = True
    """Elect signs and average what agrees; else the weighted sum (della_linear)."""
    scale: float = 1.0
    """Factor on the result (the paper's lambda: 1 to 1.1)."""

    spaces = ("aligned", "delta")

    def __post_init__(self) -> None:
        check_density("della", self.density)
        check_choices(self, "della")
        low, high = self.density - self.epsilon, self.density + self.epsilon
        if self.epsilon < 0 or low <= 0 or high > 1:
            raise PlaitError(
                f"della: density -+ epsilon must lie in (0, 1], not {low:g} and {high:g}."
            )
        if not self.elect:
            self.spaces = ("factors", "aligned", "delta")  # type: ignore[assignment]

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        left = []
        for i, low in enumerate(lows):
            singular = low.balanced()
            key = key_of(changes.seed, changes.path, "della", i)
            numbers = uniform_at(key, range(singular.rank), singular.shape[-1])
            A = self._kept(singular.A, numbers)
            if self.rescale == "l1":
                A = A * _ratio(singular.A.abs().sum(), A.abs().sum()).to(A.dtype)
            left.append(LowRank(singular.B, A, singular.scale))
        return LowRank.weighted_sum(left, [self.scale * w for w in weights])

    def _kept(self, block: Tensor, numbers: Tensor) -> Tensor:
        q = chances(block, self.density, self.epsilon)
        value = block / q if self.rescale == "inverse" else block
        return torch.where(numbers < q, value, 0)

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        """The factors [k, 1, 1] that restore the sums of magnitudes, or 1."""
        if self.rescale != "l1":
            return 1.0
        total, left = torch.zeros(2, changes.k, dtype=torch.float64)
        for rows in changes.ranges():
            block = changes.rows(rows)
            total += block.abs().double().sum((1, 2))
            kept = self._kept(block, changes.uniform("della", rows))
            left += kept.abs().double().sum((1, 2))
        return _ratio(total, left).to(changes.dtype)[:, None, None]

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        kept = self._kept(block, changes.uniform("della", rows)) * found
        return self.scale * (elect(kept, weights) if self.elect else (weights * kept).sum(0))


def _ratio(total: Tensor, left: Tensor) -> Tensor:
    return torch.where(left > 0, total / torch.where(left > 0, left, 1), 1)


METHOD = MergeMethod(
    name="della",
    title="DELLA: drop entries at random, the small ones more often",
    paper="Deep et al., 2024, arXiv 2406.11617",
    merge=Della,
    whole={"density": 1.0, "epsilon": 0.0},
    symmetric=False,
)
