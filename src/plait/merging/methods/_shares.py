"""Merges that are a weighted sum with weights of their own making."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import Merge


class SharesMerge(Merge):
    """Subclasses say `shares`; the sum is exact in factors, and taken by rows in dW."""

    spaces = ("factors", "delta")

    def shares(self, path: str, weights: Sequence[float]) -> list[float]:
        """The factor of each input at one site, from the merge's own weights."""
        raise NotImplementedError

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        return LowRank.weighted_sum(lows, self.shares(changes.path, weights))

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        shares = self.shares(changes.path, weights.flatten().double().tolist())
        return torch.tensor(shares, dtype=weights.dtype)[:, None, None]

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        return (found * block).sum(0)
