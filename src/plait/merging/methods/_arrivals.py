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
from plait.merging.methods._spectral import NOISE, Triplets, triplets


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


@dataclass
class DenseArrivals:
    """As `Arrivals`, of one site whose changes come as matrices of any rank.

    One singular value decomposition an arrival, of what is merged so far. Vectors have no
    directions to keep free; they are added up with their weights.
    """

    inputs: int
    alpha: float = 0.5
    most: int | None = None
    parts: Triplets | None = None
    total: Tensor | None = None
    scale: float = 1.0
    count: int = 0
    norms: float = 0.0

    def add(self, change: Tensor, weight: float) -> None:
        """One more change [out, in]; of `inputs`, a weight of 1 / inputs is the paper's."""
        if min(change.shape) == 1:
            self.total = weight * change + (0 if self.total is None else self.total)
            return
        arrived = change.double() * (weight * self.inputs)
        norm = float(arrived.norm())
        if norm == 0:
            return
        if self.parts is not None:
            U, S, V = self.parts
            inside = mask(len(S), occupied(S, self.alpha)) * (U.mT @ arrived @ V)
            arrived += U @ (torch.diag(self.scale * S) - inside) @ V.mT
        self.count, self.norms = self.count + 1, self.norms + norm
        U, S, V = _triplets(arrived, self.most)
        self.scale = float(S.norm()) * self.count / self.norms
        self.parts = U, S / self.scale, V

    def merged(self, like: Tensor) -> Tensor:
        """What is merged so far, of the shape and type of `like`."""
        if self.total is not None:
            return self.total
        if self.parts is None:
            return torch.zeros_like(like)
        U, S, V = self.parts
        return ((U * S) @ V.mT).to(like.dtype)


def outside(merged: LowRank, low: LowRank, alpha: float) -> LowRank:
    """`low` without what lies in the occupied directions of `merged`, and without its diagonal."""
    U, S, V = triplets(merged)
    B, A = low.B.double(), low.A.double()
    taken = (U.mT @ B) @ (A @ V) * low.scale
    inside = LowRank(U, (taken * mask(len(S), occupied(S, alpha))) @ V.mT)
    wide = LowRank(B, A, low.scale)
    return LowRank.weighted_sum([wide, inside], [1.0, -1.0]).to(dtype=low.dtype)


def mask(size: int, split: int) -> Tensor:
    """Ones [size, size] on the diagonal and in the leading `split` rows and columns."""
    made = torch.eye(size, dtype=torch.float64)
    made[:split, :split] = 1
    return made


def occupied(S: Tensor, alpha: float) -> int:
    """How many leading values [p] stay below `alpha` of their sum; all of them at 1."""
    if alpha >= 1 or not len(S):
        return len(S)
    return int((S.cumsum(0) <= alpha * S.sum()).sum())


def _triplets(matrix: Tensor, most: int | None) -> Triplets:
    """U, S and V of a matrix, without what is rounding or beyond rank `most`."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = int((NOISE * S[0] < S).sum())
    kept = kept if most is None else min(kept, most)
    return U[:, :kept], S[:kept], Vh[:kept].mT


def _norm(changes: Mapping[str, LowRank]) -> float:
    return sum(float(low.norm()) ** 2 for low in changes.values()) ** 0.5
