"""Merges that minimise a quadratic of dW which stands for the inputs' own data.

    L(dW) = sum_i m_i |(dW - T_i) P_i^T|^2 / |dW_i|^2       m_i = k w_i / sum of the w
    C = sum_i m_i P_i^T P_i / |dW_i|^2 = V diag(l) V^T      D = sum_i m_i T_i P_i^T P_i / |dW_i|^2
    gradient 2 (dW C - D)      dW = start + (D C^+ - start) V f(l) V^T

The rows of P_i stand for task i's inputs, T_i is what dW should do to them. f is 1 at the minimum,
and less in directions in which a solver that stops early has not arrived: 1 - e^(-l t) for gradient
flow, a recursion for descent with momentum. Directions that no task has keep the start.
All of it commutes with rotations of both sides, so for adapters it runs on their cores in frames
of the stacked factors, R x R matrices with R the sum of the ranks, and is exact there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.linalg import LowRank, krylov_svd
from plait.merging.changes import Changes
from plait.merging.method import Merge

Solver = Literal["filtered", "exact", "sgd", "adam"]
Matrix = Callable[[int], Tensor]
"""One input's change, or its core, float64."""


@dataclass
class QuadraticMerge(Merge):
    """Subclasses say where it starts and each input's term; the rest is here."""

    solver: Solver = "filtered"
    """"filtered": gradient flow for `time`; "exact": the minimum; "sgd" and "adam": as many `steps`
    of the optimiser (adam works on dW itself, in space `delta` alone)."""
    time: float = 300.0
    """Of the flow: directions with l well above 1 / time settle, those well below stay."""
    steps: int = 300
    """Of sgd and adam (paper: 300)."""
    lr: float | None = None
    """Of sgd and adam; None is the released code's 1e-4 and 1e-5."""
    momentum: float = 0.9
    """Of sgd."""
    keep: float | Literal["adaptive"] | None = None
    """Settle only this share of the directions that are there, those of greatest l; "adaptive" is
    ceil((sum of sqrt l)^2 / sum of l) of them; None is all."""
    cutoff: float = 1e-12
    """Directions whose l is below this share of the greatest count as absent."""
    averaged: Sequence[str] = ("embed", "lm_head", "wte", "wpe")
    """Sites whose path holds one of these take the weighted mean instead, as do vectors."""
    scale: float = 1.0
    """Factor on the result."""

    spaces = ("factors", "delta")

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        check_choices(self, name)
        share = self.keep if self.keep not in (None, "adaptive") else 1.0
        if not isinstance(share, float | int) or not 0 < share <= 1:
            raise PlaitError(f"{name}: keep is a share in (0, 1], 'adaptive' or null.")
        if self.time < 0 or self.steps < 0 or not 0 <= self.momentum < 1:
            raise PlaitError(f"{name}: time and steps are at least 0, momentum in [0, 1).")
        if self.solver == "adam":
            self.spaces = ("delta",)  # type: ignore[assignment]

    @property
    def from_sum(self) -> bool:
        """Start at sum_i m_i dW_i, k times the weighted mean, or at that mean."""
        raise NotImplementedError

    def term(self, change: Tensor, mean: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """T_i and P_i of one input's change; `rank` is the site's shorter side / k."""
        raise NotImplementedError

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        if self._plain(changes):
            return LowRank.weighted_sum(lows, [self.scale * w for w in weights])
        left, right, cores = joint_frames(lows)
        if not left.shape[1] or not right.shape[1]:
            return LowRank(lows[0].B[:, :0], lows[0].A[:0])
        core = self._solved(lambda i: cores[i], weights, min(changes.shape))
        return LowRank(left @ core, right.mT).to(dtype=changes.dtype)

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        """The merge [out, in]; None where it is the weighted mean."""
        if min(changes.shape) == 1 or self._plain(changes):
            return None
        own = weights.flatten().double().tolist()
        if changes.lows is not None and self.solver != "adam":
            return self.merge(changes.lows, own, changes).dense()
        found = self._solved(lambda i: changes.whole(i).double(), own, min(changes.shape))
        return found.to(changes.dtype)

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        if found is None:
            return self.scale * (weights * block).sum(0)
        return found[rows.start : rows.stop]

    def _shares(self, weights: Sequence[float]) -> list[float]:
        total = sum(weights)
        if min(weights) < 0 or total <= 0:
            name = type(self).__name__.lower()
            raise PlaitError(f"{name}: weights must not be negative, nor all 0.")
        return [w / total for w in weights]

    def _plain(self, changes: Changes) -> bool:
        return any(word in changes.path for word in self.averaged)

    def _solved(self, matrix: Matrix, weights: Sequence[float], shorter: int) -> Tensor:
        k, shares = len(weights), self._shares(weights)
        mean = shares[0] * matrix(0)
        for i in range(1, k):
            mean += shares[i] * matrix(i)
        C, D = mean.new_zeros(mean.shape[1], mean.shape[1]), torch.zeros_like(mean)
        for i, share in enumerate(shares):
            change = matrix(i)
            square = float(change.square().sum())
            if share and square:
                target, projector = self.term(change, mean, max(1, shorter // k))
                gram = (k * share / square) * (projector.mT @ projector)
                C += gram
                D += target @ gram
        start = mean * (k if self.from_sum else 1)
        lr = self.lr if self.lr is not None else {"adam": 1e-5}.get(self.solver, 1e-4)
        if self.solver == "adam":
            return self.scale * descended(C, D, start, lr, self.steps)
        values, V = torch.linalg.eigh(C)
        there = values > self.cutoff * values[-1].clamp_min(0)
        f = torch.where(there, self._response(values, lr), 0)
        f[: len(values) - self._count(values[there])] = 0
        gap = (D @ V) / torch.where(there, values, 1) - start @ V
        return self.scale * (start + (gap * f) @ V.mT)

    def _response(self, values: Tensor, lr: float) -> Tensor:
        """f of eigenvalues [n]."""
        if self.solver == "exact":
            return torch.ones_like(values)
        if self.solver == "filtered":
            return -torch.expm1(-values.clamp_min(0) * self.time)
        left, speed = torch.ones_like(values), torch.zeros_like(values)
        for _ in range(self.steps):
            speed = self.momentum * speed + 2 * values * left
            left = left - lr * speed
        return 1 - left

    def _count(self, values: Tensor) -> int:
        """How many of the directions that are there settle."""
        if self.keep is None or not len(values):
            return len(values)
        if self.keep == "adaptive":
            return min(len(values), math.ceil(float(values.sqrt().sum() ** 2 / values.sum())))
        return max(1, math.ceil(float(self.keep) * len(values) - 1e-9))


def joint_frames(lows: Sequence[LowRank]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Orthonormal L [out, p] and R [in, q], and cores [p, q] with L core_i R^T = dW_i; float64."""
    left, inner = torch.linalg.qr(torch.cat([low.B.double() * low.scale for low in lows], 1))
    right, outer = torch.linalg.qr(torch.cat([low.A.double() for low in lows], 0).mT)
    ranks = [low.rank for low in lows]
    parts = zip(inner.split(ranks, 1), outer.split(ranks, 1), strict=True)
    return left, right, [one @ other.mT for one, other in parts]


def leading(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank; the matrix itself where it has no more."""
    if rank >= min(matrix.shape):
        return matrix
    U, S, Vh = krylov_svd(matrix, rank)
    return (U * S) @ Vh


def descended(C: Tensor, D: Tensor, start: Tensor, lr: float, steps: int) -> Tensor:
    """Adam with its usual numbers on the quadratic, entry by entry."""
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=lr)
    for _ in range(steps):
        theta.grad = 2 * (theta.detach() @ C - D)
        optimizer.step()
    return theta.detach()
