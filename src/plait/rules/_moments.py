"""Adam's direction for quantities that are no parameter: moments kept by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class AdamMoments:
    """First and second moments of named gradients; set `count` to the step before asking."""

    betas: tuple[float, float]
    eps: float
    dtype: torch.dtype | None = None
    """Of the moments in memory; None keeps them as the gradients come."""
    count: int = 0
    kept: dict[str, list[Tensor]] = field(default_factory=dict)

    def direction(self, key: str, gradient: Tensor) -> Tensor:
        """Adam's normalised direction for `gradient`, from the moments under `key`."""
        dtype = self.dtype or gradient.dtype
        if key not in self.kept:
            zeros = torch.zeros_like(gradient, dtype=dtype)
            self.kept[key] = [zeros, zeros.clone()]
        b1, b2 = self.betas
        first = self.kept[key][0].to(gradient).lerp(gradient, 1 - b1)
        second = self.kept[key][1].to(gradient).lerp(gradient.square(), 1 - b2)
        self.kept[key] = [first.to(dtype), second.to(dtype)]
        root = (second / (1 - b2**self.count)).sqrt() + self.eps
        return first / (1 - b1**self.count) / root

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "moments": {k: list(v) for k, v in self.kept.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Moments come to their gradient's device when they are used.
        self.count = int(state["count"])
        self.kept = {key: [t.clone() for t in both] for key, both in state["moments"].items()}
