"""OPCM's state: what is merged so far, while tasks arrive one after the other.

    add(first) ──► add(second) ──► ...        merged: {site path: LowRank}, of bounded rank

Only the merged change and the one that arrives are held. The scale couples all sites: the merge's
norm, over the whole model, stays the mean of the norms of what arrived.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from plait.linalg import LowRank
from plait.merging.methods._spectral import triplets


@dataclass
class Arrivals:
    """A merge that goes on; `state` and `resume` carry it over a pause."""

    alpha: float = 0.5
    """Share of the sum of singular values that counts as occupied."""
    most: int | None = None
    """Rank to which each site is cut after every arrival; None lets ranks add up."""
    merged: dict[str, LowRank] = field(default_factory=dict)
    scale: float = 1.0
    """The last sum's norm beside the mean of the norms (the paper's lambda)."""
    count: int = 0
    norms: float = 0.0
    """Sum of the norms of what arrived."""
    dropped: dict[str, float] = field(default_factory=dict)
    """The share of its squared norm that each site's last cut dropped."""

    def add(self, changes: Mapping[str, LowRank], weight: float = 1.0) -> None:
        """One more input: {site path: its change}; sites may be missing, or new.

        `weight` beside 1 makes the input count as that much larger. What is 0 everywhere is passed
        over.
        """
        arrived = {path: low * weight for path, low in changes.items() if low.rank}
        norm = _norm(arrived)
        if norm == 0:
            return
        total = {path: low * self.scale for path, low in self.merged.items()}
        for path, low in arrived.items():
            if path in self.merged:
                low = outside(self.merged[path], low, self.alpha)
                low = LowRank.weighted_sum([total[path], low], [1.0, 1.0])
            total[path], self.dropped[path] = low.truncate(rank=self.most, energy=1.0)
        self.count, self.norms = self.count + 1, self.norms + norm
        mean = self.norms / self.count
        self.scale = _norm(total) / mean
        self.merged = {path: low * (1 / self.scale) for path, low in total.items()}

    def state(self) -> dict[str, Any]:
        """Numbers and tensors alone, for torch.save (and torch.load with weights_only)."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        factors = {path: (low.B, low.A, low.scale) for path, low in self.merged.items()}
        return plain | {"merged": factors, "dropped": dict(self.dropped)}

    @classmethod
    def resume(cls, state: Mapping[str, Any]) -> Arrivals:
        """The merge that `state` was taken of."""
        merged = {path: LowRank(*factors) for path, factors in state["merged"].items()}
        return cls(**{**state, "merged": merged, "dropped": dict(state["dropped"])})


def outside(merged: LowRank, low: LowRank, alpha: float) -> LowRank:
    """`low` without what lies in the occupied directions of `merged`, and without its diagonal."""
    U, S, V = triplets(merged)
    B, A = low.B.double(), low.A.double()
    taken = (U.mT @ B) @ (A @ V) * low.scale
    split = occupied(S, alpha)
    mask = torch.eye(len(S), dtype=torch.float64)
    mask[:split, :split] = 1
    inside = LowRank(U, (taken * mask) @ V.mT)
    wide = LowRank(B, A, low.scale)
    return LowRank.weighted_sum([wide, inside], [1.0, -1.0]).to(dtype=low.dtype)


def occupied(S: Tensor, alpha: float) -> int:
    """How many leading values [p] stay below `alpha` of their sum; all of them at 1."""
    if alpha >= 1 or not len(S):
        return len(S)
    return int((S.cumsum(0) <= alpha * S.sum()).sum())


def _norm(changes: Mapping[str, LowRank]) -> float:
    return sum(float(low.norm()) ** 2 for low in changes.values()) ** 0.5
