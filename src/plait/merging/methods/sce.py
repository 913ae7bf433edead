"""SCE: select the entries that vary, calculate a weight for each input, erase minority signs.

    1 select      the `density` of entries with the largest variance over the inputs
    2 calculate   e_i = sum of dW_i^2 over those, as a share of all inputs'
    3 erase       at every entry only changes with the sign of sum_i w_i dW_i count
    dW = the mean of those that count, weighted with w_i e_i

In the default space the entries are coordinates in a basis that the adapters share, so that the
result is of low rank; in `delta` they are those of dW, as in the paper.
Paper: FuseChat, Wan et al., 2024, arXiv 2408.07990.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.linalg import kth_magnitudes
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod
from plait.merging.methods._trim import check_density, count_of


@dataclass
class Sce(Merge):
    density: float = 0.1
    """Share of the entries that are selected (paper: 0.1); 1 takes all."""
    scale: float = 1.0
    """Factor on the result."""

    spaces = ("aligned", "delta")

    def __post_init__(self) -> None:
        check_density("sce", self.density)

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        """The variance from which entries are selected, and each input's weight [k, 1, 1]."""
        least = torch.zeros(())
        if self.density < 1:
            count = count_of(changes, self.density)
            least = kth_magnitudes(lambda: _variances(changes), [count])[0]
        energy = torch.zeros(changes.k, dtype=torch.float64)
        for block in changes.blocks():
            chosen = torch.where(_variance(block) >= least, block, 0)
            energy += chosen.double().square().sum((1, 2))
        share = energy / energy.sum() if bool(energy.any()) else torch.full_like(energy, 1.0)
        return least, weights * share.to(weights.dtype)[:, None, None]

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        least, factors = found
        majority = torch.where((weights * block).sum(0) >= 0, 1.0, -1.0)
        counts = (weights * block).sign() == majority
        chosen = torch.where(counts, factors * block, 0).sum(0)
        total = torch.where(counts, factors.abs(), 0).sum(0)
        mean = chosen / total.clamp_min(math.sqrt(torch.finfo(block.dtype).tiny))
        return self.scale * torch.where(_variance(block) >= least, mean, 0)


def _variance(block: Tensor) -> Tensor:
    """Over the inputs, [rows, in] in float32, in which thresholds are found."""
    return block.var(0, correction=0).float()


def _variances(changes: Changes) -> Iterator[Tensor]:
    return (_variance(block)[None] for block in changes.blocks())


METHOD = MergeMethod(
    name="sce",
    title="SCE: entries that vary, weighted by energy, minority signs erased",
    paper="Wan et al., 2024, arXiv 2408.07990",
    merge=Sce,
    whole={"density": 1.0},
)
