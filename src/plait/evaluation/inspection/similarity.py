"""How alike adapters are: the angle between their changes, and between the spaces they act in.

cosine         <dW_1, dW_2> / (|dW_1| |dW_2|), in factor space: tr((B_1^T B_2)(A_2 A_1^T))
column angles  principal angles between the column spaces, where changes write
row angles     principal angles between the row spaces, from which they read
overlap        mean squared cosine of the angles: 1 where the smaller space lies in the larger,
               about r / side between two that know nothing of each other
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plait.linalg import LowRank, principal_angles

NEGLIGIBLE = 1e-6
"""Directions of singular values below this share of the greatest are rounding."""

Change = LowRank | Tensor


@dataclass(frozen=True)
class SitePair:
    """Two changes at one site; angles in degrees, ascending, empty for changes without factors."""

    path: str
    cosine: float
    column_overlap: float | None = None
    row_overlap: float | None = None
    column_angles: list[float] = field(default_factory=list)
    row_angles: list[float] = field(default_factory=list)


@dataclass
class Pair:
    """Two adapters over the sites that both change. `cosine` is that of everything together, where
    a site that only one of them changes counts as a change of nothing."""

    first: str
    second: str
    cosine: float | None
    column_overlap: float | None
    row_overlap: float | None
    sites: list[SitePair]


class Similarities:
    """Collects pairs of changes site by site, so that no more than one site is held at a time."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = list(labels)
        count = len(self.labels)
        self._pairs: dict[tuple[int, int], list[SitePair]] = {
            (i, j): [] for i in range(count) for j in range(i + 1, count)
        }
        self._inner = dict.fromkeys(self._pairs, 0.0)
        self._squares = [0.0] * count

    def add(self, path: str, changes: Sequence[Change | None]) -> None:
        """The changes of all adapters at one site, None for one that has none there."""
        spaces = [None if c is None else _Space(c) for c in changes]
        for i, space in enumerate(spaces):
            self._squares[i] += 0.0 if space is None else space.norm**2
        for i, j in self._pairs:
            one, two = spaces[i], spaces[j]
            if one is None or two is None or one.shape != two.shape:
                continue
            inner = _inner(one.change, two.change)
            self._inner[i, j] += inner
            if one.norm and two.norm:
                cosine = max(-1.0, min(1.0, inner / (one.norm * two.norm)))
                self._pairs[i, j].append(_site_pair(path, cosine, one, two))

    def pairs(self) -> list[Pair]:
        found = []
        for (i, j), sites in self._pairs.items():
            lengths = math.sqrt(self._squares[i] * self._squares[j])
            cosine = self._inner[i, j] / lengths if lengths and sites else None
            columns, rows = (
                _mean([getattr(s, f"{side}_overlap") for s in sites]) for side in ("column", "row")
            )
            pair = Pair(self.labels[i], self.labels[j], cosine, columns, rows, sites)
            found.append(pair)
        return found


class _Space:
    """One change with what every comparison needs of it, in float64."""

    def __init__(self, change: Change) -> None:
        self.shape = tuple(change.shape)
        self.columns: Tensor | None = None
        self.rows: Tensor | None = None
        if isinstance(change, Tensor):
            self.change: Change = change.detach().double()
            self.norm = float(torch.linalg.vector_norm(self.change))
            return
        self.change = low = change.to("cpu", torch.float64)
        self.norm = float(low.norm().square().sum().sqrt())
        if low.B.dim() == 2 and low.rank < min(self.shape):
            U, S, Vh = low.svd()
            kept = int((NEGLIGIBLE * S[:1] < S).sum())
            self.columns, self.rows = U[:, :kept], Vh[:kept].mT


def _inner(one: Change, two: Change) -> float:
    if isinstance(one, LowRank) and isinstance(two, LowRank):
        return float(one.inner(two).sum())
    if isinstance(one, LowRank):
        one, two = two, one
    assert isinstance(one, Tensor)
    if isinstance(two, Tensor):
        return float((one * two).sum())
    return float(((two.B.mT @ one.cpu()) * two.A).sum()) * two.scale


def _site_pair(path: str, cosine: float, one: _Space, two: _Space) -> SitePair:
    if one.columns is None or one.rows is None or two.columns is None or two.rows is None:
        return SitePair(path, cosine)
    columns = principal_angles(one.columns, two.columns)
    rows = principal_angles(one.rows, two.rows)
    return SitePair(
        path,
        cosine,
        float(columns.cos().square().mean()),
        float(rows.cos().square().mean()),
        columns.rad2deg().tolist(),
        rows.rad2deg().tolist(),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
