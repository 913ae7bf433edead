"""`Found`: what a search returns, and its end as one plain LoRA."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from plait.adapter import Adapter
from plait.adapter.weighting import Weight
from plait.merging.driver import merge
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.stored import fold, write_coefficients

if TYPE_CHECKING:
    from plait.merging.search.front import Front

Penalty = Callable[[Tensor], Tensor]
"""Of the coefficients [k, g]: a scalar added to the objective."""


@dataclass(frozen=True)
class Found:
    """Coefficients c [k, g], the objective where it was last (or best) known, and every step."""

    space: Coefficients = field(repr=False)
    coefficients: Tensor
    value: float
    history: list[dict[str, Any]] = field(repr=False)
    facts: dict[str, Any] = field(default_factory=dict, repr=False)
    """More that a method found."""
    front: Front | None = field(default=None, repr=False)
    """All of several tasks' compromises, of which this is one."""

    @property
    def summed(self) -> bool:
        """Whether the result is the adapters' sum with `weights()`, and so `save` tells it all."""
        return True

    def weights(self) -> list[dict[str, Weight]]:
        """{site path: weight} for each adapter."""
        return self.space.weights(self.coefficients.detach())

    def activate(self) -> None:
        """Run the model with these coefficients, adapters unmerged."""
        self.space.use(self.coefficients.detach())

    def merged(
        self, name: str = "merged", rank: int | None = None, energy: float | None = None
    ) -> Adapter:
        """One plain LoRA of the same outputs (rank: the sum of the ranks, unless it is cut)."""
        inputs, weights = fold(self.space.adapters, self.weights())
        return merge(inputs, weights=weights, name=name, rank=rank, energy=energy)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the coefficients, as `read_coefficients` and `plait merge --weights` take them."""
        return write_coefficients(path, self.space.described_weights(self.coefficients))
