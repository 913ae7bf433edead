"""Nearswap: small changes of another model whole, of the large ones no more than a step.

    dW = sum_i w_i clamp(dW_i, -t, t)

An entry that differs from the base by at most t becomes the other model's; one that differs by more
moves by t towards it. In the default space the entries are coordinates in a basis that the adapters
share; in `delta` they are those of dW, as in the original, of which one input with weight 1 is the
case. Taken from the description of the method of that name in mergekit: the base is interpolated
to the other model with the weight t / |difference|, at most 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plait.errors import PlaitError
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod


@dataclass
class Nearswap(Merge):
    t: float = 1e-4
    """The largest change of an entry (the published example's: 0.0001)."""
    scale: float = 1.0
    """Factor on the result."""

    spaces = ("aligned", "delta")

    def __post_init__(self) -> None:
        if self.t < 0:
            raise PlaitError(f"nearswap: t is a size from 0, not {self.t}.")

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        return self.scale * (weights * block.clamp(-self.t, self.t)).sum(0)


METHOD = MergeMethod(
    name="nearswap",
    title="Nearswap: small changes whole, large ones a step",
    paper="alchemonaut, QuartetAnemoi-70B, 2024; mergekit",
    merge=Nearswap,
    whole={"t": 1e6},
)
