"""`Front`: the Pareto-optimal coefficients of several tasks, and choosing one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.found import Found
from plait.merging.search.pareto import Quadratic


@dataclass(frozen=True)
class Front:
    """Coefficients that no others are better than at every task, by the surrogates."""

    space: Coefficients = field(repr=False)
    objectives: list[str]
    """Names of the T metrics, the greater the better."""
    points: Tensor = field(repr=False)
    """[p, k, g]."""
    metrics: Tensor = field(repr=False)
    """[p, T], by the surrogates."""
    surrogates: list[Quadratic] = field(repr=False)
    measured: Tensor = field(repr=False)
    """[S, T]: what the model was measured at."""
    history: list[dict[str, Any]] = field(repr=False)
    facts: dict[str, Any] = field(default_factory=dict, repr=False)

    def choose(self, preference: Sequence[float] | None = None) -> Found:
        """The point of greatest weighted mean of metrics, each scaled to [0, 1] over the front.

        `preference` has a weight for each objective; None weighs them alike.
        """
        count = self.metrics.shape[1]
        best = favourite(self.metrics, checked(preference, count))
        w = checked(preference, count)
        facts = self.facts | {"metrics": self.metrics[best].tolist()}
        value = float(self.metrics[best] @ w)
        return Found(self.space, self.points[best], value, self.history, facts, self)

    def described(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "objectives": self.objectives,
            "points": self.points.tolist(),
            "metrics": self.metrics.tolist(),
            "measured": self.measured.tolist(),
            "r2": [s.r2 for s in self.surrogates],
            "held_out_r2": [s.held_out_r2 for s in self.surrogates],
        }


def checked(preference: Sequence[float] | None, count: int) -> Tensor:
    """Weights [count] that add up to 1."""
    w = torch.tensor([1.0] * count if preference is None else list(preference)).double()
    if len(w) != count or bool((w < 0).any()) or not bool(w.sum() > 0):
        raise PlaitError(f"a preference is {count} weights of at least 0, not all of them 0.")
    return w / w.sum()


def favourite(metrics: Tensor, weights: Tensor) -> int:
    """The row of greatest weighted mean, each column scaled to [0, 1]."""
    low, high = metrics.amin(0), metrics.amax(0)
    return int(((metrics - low) / (high - low).clamp_min(1e-12) @ weights).argmax())
