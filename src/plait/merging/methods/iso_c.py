"""Iso-C: the weighted sum of the changes, its spectrum made flat.

    sum_i w_i dW_i = U S V^T       dW = scale * U diag((1 - flatten) S + flatten mean(S)) V^T

Directions that many inputs share dominate a sum; flat, all that any input has count alike. The mean
is over the singular values that are there: R at most, the sum of the ranks. (Dense code divides by
the shorter side of the matrix, and gives most of the energy of a merge of adapters to arbitrary
directions of the null space.) Exact in factors.
Paper: Marczak et al., 2025, arXiv 2502.04959. Departure: weights default to 1 / k, so that the
paper's sum is scale = k; biases and norms take the weighted mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import MergeMethod
from plait.merging.methods._spectral import SpectralMerge, triplets


def flattened(S: Tensor, share: float) -> Tensor:
    """Values [p] moved towards their mean, all the way at share 1."""
    return S + share * (S.mean() - S) if len(S) else S


def check_flatten(method: str, flatten: float) -> None:
    if not 0 <= flatten <= 1:
        raise PlaitError(f"{method}: flatten is a share in [0, 1], not {flatten}.")


@dataclass
class IsoC(SpectralMerge):
    flatten: float = 1.0
    """How far singular values go to their mean: 1 is the paper's, 0 leaves the weighted sum."""
    scale: float = 1.0
    """Factor on the result (paper: swept from 0.5 to 2 on the sum of tasks)."""

    def __post_init__(self) -> None:
        check_flatten("iso-c", self.flatten)

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        U, S, V = triplets(LowRank.weighted_sum(lows, weights))
        S = self.scale * flattened(S, self.flatten)
        return LowRank((U * S).to(changes.dtype), V.mT.to(changes.dtype))


METHOD = MergeMethod(
    name="iso-c",
    title="Iso-C: a sum with a flat spectrum",
    paper="Marczak et al., 2025, arXiv 2502.04959",
    merge=IsoC,
    whole={"flatten": 0.0},
)
