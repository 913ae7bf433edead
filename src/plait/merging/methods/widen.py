"""WIDEN: every input's change weighed by column, by how far it moved the base's magnitudes and
directions beside that input's own average.

    of column c of W_i = W0 + dW_i:   m_i = | |W_i| - |W0| |        d_i = 1 - cos(W_i, W0)
    q = share of the input's columns that moved less                (for m and for d)
    s_i = softmax of q over the inputs, but `value` where q_i > threshold * mean of q_i
    dW = sum_i k w_i dW_i diag(s_i),   s = (s of m + s of d) / 2

Ranks within an input make a chat tune and a continued pre-training comparable, whatever the size of
their changes. Several inputs may get the full `value` on one column, so it can count k times over:
that is the paper's formula. Exact in factors: |W_i|^2 = |W0|^2 + 2 <H, A> + A^T G A by column, with
H = B^T W0 and G = B^T B, for which W0 is read once, in blocks of rows; the result is of the ranks'
sum. 1 - cos comes from the part of dW beside W0, so that small changes do not cancel. A matrix of
one row has no directions: there, as for vectors, |dW_i| itself takes the place of q.
Paper: Yu et al., 2024, arXiv 2408.03092. Departures: columns that moved alike have one rank
(paper: the order in which they stand), an input that changes nothing at a site takes no share
there, and weights (1 / k is the paper).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod

EMBEDDINGS = r"(embed_tokens|embed_in|word_embeddings|tok_embeddings|wte|shared)\.weight$"


@dataclass
class Widen(Merge):
    threshold: float = 1.0
    """How far above an input's mean rank a column must lie to count in full (paper: 1)."""
    value: float = 1.0
    """The score of such a column (paper: 1)."""
    transposed: str = EMBEDDINGS
    """Tensors of checkpoints (a regular expression that their names must hold) whose inputs lie on
    the rows: token embeddings, of which a token is a column. Adapters know it themselves."""

    spaces = ("factors", "delta")
    reads_base = True

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise PlaitError(f"widen: threshold is 0 or more, not {self.threshold}.")

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        if changes.shape[0] == 1:
            shares = self._of_vectors(changes)
        else:
            shares = self._of_columns(*_column_facts(lows, changes))
        size = len(lows) * torch.tensor(list(weights), dtype=torch.float64)[:, None]
        scaled = [
            LowRank(low.B, low.A * row.to(low.dtype), low.scale)
            for low, row in zip(lows, size * shares, strict=True)
        ]
        return LowRank.weighted_sum(scaled, [1.0] * len(scaled))

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        """Factors [k, 1, in] of the columns, or [k, out, 1] of the rows."""
        across = changes.lows is None and bool(re.search(self.transposed, changes.path))
        if changes.shape[0] == 1:
            across, shares = False, self._of_vectors(changes)
        else:
            shares = self._of_columns(*_line_facts(changes, across))
        shares = len(weights) * weights[:, 0].double() * shares
        return (shares[:, :, None] if across else shares[:, None, :]).to(weights.dtype)

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        here = found if found.shape[1] == 1 else found[:, rows.start : rows.stop]
        return (here * block).sum(0)

    def _of_columns(self, square: Tensor, cross: Tensor, own: Tensor) -> Tensor:
        """s [k, n] of n columns, from |W0|^2 [n], <W0, dW_i> and |dW_i|^2 [k, n] in float64."""
        acts = own.sum(1) > 0
        scores = [self._scores(_ranks(moved), acts) for moved in _moved(square, cross, own)]
        return (scores[0] + scores[1]) / 2

    def _of_vectors(self, changes: Changes) -> Tensor:
        sizes = changes.rows(range(1))[:, 0].double().abs()
        return self._scores(sizes, sizes.sum(1) > 0)

    def _scores(self, q: Tensor, acts: Tensor) -> Tensor:
        """Softmax over the inputs that act, `value` where an input is above its own mean."""
        if not bool(acts.any()):
            return torch.zeros_like(q)
        shares = q.masked_fill(~acts[:, None], -torch.inf).softmax(0)
        # A rank that is the mean itself must not be above it by rounding.
        above = q > self.threshold * q.mean(1, keepdim=True) * (1 + 1e-12)
        return torch.where(above, self.value, shares)


def _moved(square: Tensor, cross: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """How far every column's magnitude and direction moved, [k, n]."""
    before, after = square.sqrt(), (square + 2 * cross + own).clamp_min(0).sqrt()
    some, both = (before + after) > 0, (before * after) > 0
    magnitude = (2 * cross + own).abs() / torch.where(some, before + after, 1)
    cosine = (square + cross) / torch.where(both, before * after, 1)
    beside = (own - cross.square() / torch.where(square > 0, square, 1)).clamp_min(0)
    sine = beside / torch.where(both, after, 1).square()
    angle = torch.where(cosine > 0, sine / (1 + cosine.clamp_min(0)), 1 - cosine)
    # A column that was 0 (a padding token) or becomes it has no direction: it turned in full.
    return magnitude, torch.where(both, angle, some.to(angle.dtype))


def _ranks(moved: Tensor) -> Tensor:
    """The share of an input's columns that moved less, [k, n] in [0, 1)."""
    return torch.searchsorted(moved.sort(1).values, moved).to(moved.dtype) / moved.shape[1]


def _column_facts(lows: Sequence[LowRank], changes: Changes) -> tuple[Tensor, Tensor, Tensor]:
    sides = [(low.B.double() * low.scale, low.A.double()) for low in lows]
    square = torch.zeros(changes.shape[1], dtype=torch.float64)
    H = [torch.zeros_like(A) for _, A in sides]
    for rows in changes.ranges():
        W = changes.base_weight(rows).double()
        square += W.square().sum(0)
        for h, (B, _) in zip(H, sides, strict=True):
            h += B[rows.start : rows.stop].mT @ W
    cross = torch.stack([(h * A).sum(0) for h, (_, A) in zip(H, sides, strict=True)])
    own = torch.stack([(A * (B.mT @ B @ A)).sum(0) for B, A in sides])
    return square, cross, own.clamp_min(0)


def _line_facts(changes: Changes, across: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same of dense changes; of the rows where `across`."""
    axis, found = (-1 if across else -2), []
    for rows in changes.ranges():
        W, block = changes.base_weight(rows).double(), changes.rows(rows).double()
        found.append(((W * W).sum(axis), (W * block).sum(axis), (block * block).sum(axis)))
    if across:
        square, cross, own = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    else:
        square, cross, own = (torch.stack(parts).sum(0) for parts in zip(*found, strict=True))
    return square, cross, own


METHOD = MergeMethod(
    name="widen",
    title="WIDEN: columns weighed by how far they moved from the base",
    paper="Yu et al., 2024, arXiv 2408.03092",
    merge=Widen,
    whole={"threshold": 4.0},
)
