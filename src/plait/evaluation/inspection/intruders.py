"""Intruder dimensions: leading singular vectors of the adapted weight that the base does not have.

    y_j  left singular vector j of W + dW, j < top          x_i  those of W, all of them
    y_j is an intruder where  max_i |cos(y_j, x_i)| < threshold

Full fine-tuning keeps the directions of W and turns them a little; LoRA at a high learning rate
adds new ones above them, which goes with forgetting. Shuttleworth et al., "LoRA vs Full
Fine-tuning: An Illusion of Equivalence", 2024, arXiv 2410.21228 (their k = 10; threshold 0.5).

Few of W's vectors are needed as a rule. With the `known` leading x_i, a vector is settled where one
of them resembles it, and also where too little of its length is left for any other to; only a
vector that is neither asks for all of W's, by the eigenvectors of its Gram matrix in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plait.evaluation.inspection.report import Intruders
from plait.linalg import LowRank
from plait.linalg.precision import accumulator_dtype

EXTRA = 22
"""More of W's leading vectors than are asked about, so that those converge."""
ROUNDS = 3
"""Products with W and its transpose for the leading vectors, started from a random sketch."""
EXACT_SIDE = 2048
"""The longest shorter side of W of which all singular vectors are computed in case of doubt."""


@dataclass(frozen=True)
class IntruderSearch:
    """`top` vectors of the adapted weight, and the |cosine| below which one is an intruder."""

    top: int = 10
    threshold: float = 0.5


@dataclass(frozen=True)
class Leading:
    """W's leading left and right singular vectors (columns), for every adapter at one site."""

    left: Tensor
    right: Tensor


def leading_vectors(W: Tensor, count: int, seed: int = 0) -> Leading:
    """About `count` leading singular vectors on each side of W [out, in]."""
    W = W.float()
    width = min(count, *W.shape)
    sketch = torch.randn(W.shape[1], width, generator=torch.Generator().manual_seed(seed))
    return _iterate(W, None, sketch.to(W.device), ROUNDS)


def find_intruders(
    W: Tensor, change: LowRank | Tensor, search: IntruderSearch, known: Leading | None = None
) -> Intruders:
    """The intruders of W + dW, for W [out, in] and a change of that shape.

    `known` saves finding W's own vectors again (`leading_vectors(W, search.top + EXTRA)`).
    """
    W = W.float()
    top = min(search.top, *W.shape)
    known = known if known is not None else leading_vectors(W, search.top + EXTRA)
    mine = _adapted_vectors(W, change, known)[:, :top]
    inside = known.left.mT @ mine
    best = inside.abs().amax(0)
    rest = (1 - inside.square().sum(0)).clamp_min(0).sqrt()
    exact = min(W.shape) <= EXACT_SIDE
    doubtful = (best < search.threshold) & (rest >= search.threshold)
    # A vector that is not settled yet may also be one that has not converged; the Gram matrix
    # settles both.
    if exact and bool((best < search.threshold).any()):
        best = _all_cosines(W, change, top)
    elif bool(doubtful.any()):
        exact = False
    indices = (best < search.threshold).nonzero().flatten().tolist()
    return Intruders(top, indices, best.clamp_max(1).tolist(), exact)


def _adapted_vectors(W: Tensor, change: LowRank | Tensor, known: Leading) -> Tensor:
    """Left singular vectors of W + dW, from a start that spans W's own leading ones and dW's."""
    if isinstance(change, LowRank):
        extra = torch.linalg.qr(change.A.to(W).mT).Q
        change = change.to(dtype=W.dtype)
    else:
        change = change.to(W)
        draw = torch.Generator().manual_seed(1)
        sketch = torch.randn(change.shape[0], 16, generator=draw).to(W)
        extra = change.mT @ sketch
    start = torch.cat([known.right, extra], dim=1)[:, : min(W.shape)]
    return _iterate(W, change, start, 2).left


def _iterate(W: Tensor, change: LowRank | Tensor | None, start: Tensor, rounds: int) -> Leading:
    """Subspace iteration with W + change, whose sum is never formed where the change is factors."""
    right = torch.linalg.qr(start).Q
    for _ in range(rounds):
        left = torch.linalg.qr(_times(W, change, right)).Q
        right = torch.linalg.qr(_turned(W, change, left)).Q
    U, _, Vh = torch.linalg.svd(_times(W, change, right), full_matrices=False)
    return Leading(U, right @ Vh.mT)


def _times(W: Tensor, change: LowRank | Tensor | None, X: Tensor) -> Tensor:
    product = W @ X
    if isinstance(change, LowRank):
        return product + change.matmul(X.mT).mT
    return product if change is None else product + change @ X


def _turned(W: Tensor, change: LowRank | Tensor | None, X: Tensor) -> Tensor:
    return _times(W.mT, change.transpose() if isinstance(change, LowRank) else _mT(change), X)


def _mT(change: Tensor | None) -> Tensor | None:
    return None if change is None else change.mT


def _all_cosines(W: Tensor, change: LowRank | Tensor, top: int) -> Tensor:
    """For each of the `top` leading left singular vectors of W + dW, its best |cosine| over all of
    W's. Where W is taller than wide, W has only as many as it has columns."""
    wide = W.to(accumulator_dtype(W.device))
    dense = change.dense(wide.dtype) if isinstance(change, LowRank) else change.to(wide)
    mine = _left_vectors(wide + dense)[:, :top]
    return (_left_vectors(wide).mT @ mine).abs().amax(0).to(W.dtype)


def _left_vectors(M: Tensor) -> Tensor:
    """All min(out, in) left singular vectors, the greatest first."""
    if M.shape[0] <= M.shape[1]:
        return torch.linalg.eigh(M @ M.mT).eigenvectors.flip(-1)
    V = torch.linalg.eigh(M.mT @ M).eigenvectors
    left = M @ V.flip(-1)
    lengths = torch.linalg.vector_norm(left, dim=0)
    return left / torch.where(lengths > 0, lengths, 1)
