"""OPCM: tasks arrive one after the other; each is added outside the directions already in use.

    D = U S V^T what is merged so far        P = U^T dW_t V, [R, R]
    dW~ = dW_t - U (mask * P) V^T      mask: the diagonal, and the leading block that holds alpha
    D <- (l D + dW~) / l'              l': the norm of D becomes the mean of the norms so far

`plait.merging.methods.opcm.Arrivals` takes inputs as they come, whatever their number, in constant
memory with `most`, and scales by the norm of the whole model, as the paper does. As a method it
takes all inputs of a merge in their order, each site for itself; a weight of w counts as an input
k w times as large, so that 1 / k is the paper's. Adapters are merged on factors, of rank R + r at a
step: dense code also clears a diagonal in the null space, whose vectors are arbitrary. Full
checkpoints are read one after the other: memory holds one of them, whatever their number.
Paper: Tang et al., 2025, arXiv 2501.09522. Departures: norms site by site (here, not in
`Arrivals`); alpha 1 projects away all of D's directions; biases and norms take the weighted sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import MergeMethod
from plait.merging.methods._arrivals import Arrivals, DenseArrivals
from plait.merging.sequence import SequentialMerge

__all__ = ["METHOD", "Arrivals", "Opcm"]


@dataclass
class Opcm(SequentialMerge):
    alpha: float = 0.5
    """Share of the sum of singular values whose directions are kept free of what comes later
    (paper: 0.5)."""
    most: int | None = None
    """Rank to which the merge is cut after each input; None lets ranks add up (exact)."""
    scale: float = 1.0
    """Factor on the result."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise PlaitError(f"opcm: alpha is a share in [0, 1], not {self.alpha}.")
        if self.most is not None and self.most < 1:
            raise PlaitError(f"opcm: most is a rank from 1, not {self.most}.")

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        so_far = Arrivals(self.alpha, self.most)
        for low, weight in zip(lows, weights, strict=True):
            so_far.add({changes.path: low}, len(lows) * weight)
        nothing = LowRank(lows[0].B[:, :0], lows[0].A[:0])
        return so_far.merged.get(changes.path, nothing) * self.scale

    def begin(self, count: int) -> DenseArrivals:
        return DenseArrivals(count, self.alpha, self.most)

    def arrive(self, so_far: DenseArrivals, change: Tensor, weight: float) -> DenseArrivals:
        so_far.add(change, weight)
        return so_far

    def end(self, so_far: DenseArrivals, change: Tensor) -> Tensor:
        return self.scale * so_far.merged(change)


METHOD = MergeMethod(
    name="opcm",
    title="OPCM: one after the other, outside the directions in use",
    paper="Tang et al., 2025, arXiv 2501.09522",
    merge=Opcm,
    symmetric=False,
)
