"""`Found`: what a search returns, and its end as one plain LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from plait.adapter import Adapter
from plait.merging.driver import merge
from plait.merging.search.coefficients import Coefficients

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

    def weights(self) -> list[dict[str, float]]:
        """{site path: weight} for each adapter."""
        return self.space.weights(self.coefficients)

    def activate(self) -> None:
        """Run the model with these coefficients, adapters unmerged."""
        self.space.use(self.coefficients.detach())

    def merged(
        self, name: str = "merged", rank: int | None = None, energy: float | None = None
    ) -> Adapter:
        """One plain LoRA of the same outputs (rank: the sum of the ranks, unless it is cut)."""
        return merge(
            self.space.adapters, weights=self.weights(), name=name, rank=rank, energy=energy
        )
