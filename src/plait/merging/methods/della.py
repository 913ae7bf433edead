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
from plait.merging.methods._election import Reduce, elect
from plait.merging.methods._trim import check_density, densities


def chances(block: Tensor, density: float | Tensor, epsilon: float | Tensor) -> Tensor:
    """q [..., rows, in] of a block's entries; the mean over each row is the density.

    Tensors of both [k, 1, 1] are those of the inputs in a block [k, rows, in].
    """
    columns = block.shape[-1]
    # Ranks are counted in whole numbers: half types cannot tell more than 256 of them apart.
    rank = block.abs().argsort(dim=-1, stable=True).argsort(dim=-1)
    u = rank.to(block.dtype) / (columns - 1) if columns > 1 else torch.full_like(block, 0.5)
    return density - epsilon + 2 * epsilon * u


@dataclass
class Della(Merge):
    density: float | Sequence[float] = 0.5
    """Share of the entries that stay (paper: 0.1 to 0.7), or one for each input."""
    epsilon: float | Sequence[float] = 0.15
    """Half of the span of the chances in a row (paper: 0.07 to 0.15), or one for each input; 0 is
    DARE's one chance."""
    rescale: Literal["inverse", "l1", "none"] = "inverse"
    """Divide what stays by its chance (paper), by what restores the sum of |dW_i|, or by 1."""
    elect: bool = True
    """Elect signs and merge what agrees; else the weighted sum (della_linear)."""
    reduce: Reduce = "mean"
    """With `elect`, of those that agree: their weighted mean, their sum, or the largest."""
    scale: float = 1.0
    """Factor on the result (the paper's lambda: 1 to 1.1)."""

    spaces = ("aligned", "delta")

    def __post_init__(self) -> None:
        check_density("della", self.density)
        check_choices(self, "della")
        for density, epsilon in _pairs(self.density, self.epsilon):
            low, high = density - epsilon, density + epsilon
            if epsilon < 0 or low <= 0 or high > 1:
                raise PlaitError(
                    f"della: density -+ epsilon must lie in (0, 1], not {low:g} and {high:g}."
                )
        if not self.elect:
            self.spaces = ("factors", "aligned", "delta")  # type: ignore[assignment]

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        left = []
        shares = zip(
            densities(changes, self.density), densities(changes, self.epsilon), strict=True
        )
        for i, (low, share) in enumerate(zip(lows, shares, strict=True)):
            singular = low.balanced()
            key = key_of(changes.seed, changes.path, "della", i)
            numbers = uniform_at(key, range(singular.rank), singular.shape[-1])
            A = self._kept(singular.A, numbers, *share)
            if self.rescale == "l1":
                A = A * _ratio(singular.A.abs().sum(), A.abs().sum()).to(A.dtype)
            left.append(LowRank(singular.B, A, singular.scale))
        return LowRank.weighted_sum(left, [self.scale * w for w in weights])

    def _kept(
        self, block: Tensor, numbers: Tensor, density: float | Tensor, epsilon: float | Tensor
    ) -> Tensor:
        q = chances(block, density, epsilon)
        value = block / q if self.rescale == "inverse" else block
        return torch.where(numbers < q, value, 0)

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        """Densities and epsilons [k, 1, 1], and what restores the sums of magnitudes, or 1."""
        density, epsilon = (
            torch.tensor(densities(changes, share), dtype=changes.dtype)[:, None, None]
            for share in (self.density, self.epsilon)
        )
        if self.rescale != "l1":
            return density, epsilon, 1.0
        total, left = torch.zeros(2, changes.k, dtype=torch.float64)
        for rows in changes.ranges():
            block = changes.rows(rows)
            total += block.abs().double().sum((1, 2))
            kept = self._kept(block, changes.uniform("della", rows), density, epsilon)
            left += kept.abs().double().sum((1, 2))
        return density, epsilon, _ratio(total, left).to(changes.dtype)[:, None, None]

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        density, epsilon, factors = found
        kept = self._kept(block, changes.uniform("della", rows), density, epsilon) * factors
        if self.elect:
            return self.scale * elect(kept, weights, reduce=self.reduce)
        return self.scale * (weights * kept).sum(0)


def _pairs(
    density: float | Sequence[float], epsilon: float | Sequence[float]
) -> list[tuple[float, float]]:
    """(density, epsilon) of every input, as far as they are given one by one."""
    several = [x for x in (density, epsilon) if isinstance(x, Sequence)]
    count = max((len(x) for x in several), default=1)
    one, two = (x if isinstance(x, Sequence) else [x] * count for x in (density, epsilon))
    return list(zip(one, two, strict=False))


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
