"""Fisher merging: a mean entry by entry, in which an input counts where its loss is sensitive.

    dW = sum_i w_i F_i * dW_i / sum_i w_i F_i        (* and / entry by entry)
    F_i = mean over examples of (dL_i / dW)^2        diagonal empirical Fisher of input i

The base cancels, so changes are merged. In space `aligned` entries are coordinates in a basis U
that the adapters share, and F is U's too: either measured there (`coordinates="shared"`, from
`fisher(..., bases=shared_bases(...))`) or carried over as (U * U)^T F, which is what a diagonal F
of dW says about them. The result then is of low rank and blind to how factors are turned. In
`delta` the entries are those of dW, as in the paper; of full rank until it is cut.
Paper: Matena and Raffel, 2022, arXiv 2111.09832. Weights, which must not be negative, are its
model coefficients. Biases take the weighted sum. Departure: the floor is a share of F's mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod


@dataclass
class Fisher(Merge):
    coordinates: Literal["entries", "shared"] = "entries"
    """What the statistics are of: entries of dW [out, in], or shared coordinates [p, in]."""
    floor: float = 1e-6
    """Added to F as a share of its mean over inputs and entries, where no input is sensitive."""
    scale: float = 1.0
    """Factor on the result."""

    needs = frozenset({"fisher"})

    def __post_init__(self) -> None:
        check_choices(self, "fisher")
        if self.floor <= 0:
            raise PlaitError(f"fisher: floor must be greater than 0, not {self.floor}.")
        self.spaces = ("aligned",) if self.coordinates == "shared" else ("aligned", "delta")

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        if bool((weights < 0).any()) or not bool((weights > 0).any()):
            raise PlaitError("fisher: weights must not be negative, nor all 0.")
        known = changes.known("fisher")
        carried = changes.basis if self.coordinates == "entries" else None
        rows = changes.shape[0] if carried is None else len(carried)
        _check(known, (rows, changes.shape[1]), changes)
        stacked = torch.stack(known)
        if carried is not None:
            stacked = carried.to(stacked.dtype).square().mT @ stacked
        level = stacked.mean()
        return stacked.add_(self.floor * level if level > 0 else 1.0)

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        share = weights * found[:, rows.start : rows.stop]
        return self.scale * (share * block).sum(0) / share.sum(0)


def _check(known: Sequence[Tensor], shape: tuple[int, int], changes: Changes) -> None:
    for f in known:
        if tuple(f.shape) != shape:
            raise PlaitError(
                f"site {changes.path!r}: a fisher statistic is {list(f.shape)}, but {list(shape)} "
                "is needed; compute it for the same adapters, in the same coordinates."
            )


METHOD = MergeMethod(
    name="fisher",
    title="Fisher: a mean weighted by each input's sensitivity, entry by entry",
    paper="Matena and Raffel, 2022, arXiv 2111.09832",
    merge=Fisher,
)
