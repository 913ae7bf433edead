"""PLeaS: the rank units of two adapters paired, alike ones merged and the others kept, then fitted.

    C[p, q] = <a_p, a'_q> <b_p, b'_q>         units b_p a_p of dW_1, b'_q a'_q of dW_2
    pairs: the assignment of greatest sum     the share `ratio` of them least alike stays apart
    merged pair: (mean b)(mean a), by weights; a unit alone: w_i b a
    least squares: A anew, min over A of  sum_i w_i tr (B A - dW_i) G_i (B A - dW_i)^T

Rank r (1 + ratio): ratio 1 is the plain weighted sum, ratio 0 keeps the rank, and a twin whose
units stand in another order is merged to itself. Units are no property of a change: turning its
factors makes others of them. So they are taken from its balanced singular form, which also brings
a twin's units into one order wherever singular values differ; `units="stored"` takes them as they
were trained. b and a may both be turned round, so a pair is merged with the sign that fits. The
fit leaves B as it is: A = B^+ dW, with dW the merge of `regmean` on the same Grams.
Paper: Nasery et al., 2024, arXiv 2407.02447, for whole networks (`plait.merging.permutations`);
here on the rank axis of an adapter, whose outer axes one base ties. Departure: closed form, where
the paper's release takes 400 steps of Adam; weights (their sign goes into b). Biases take the
weighted sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod
from plait.merging.methods._spectral import triplets
from plait.merging.methods.regmean import RegMean
from plait.merging.permutations.assignment import best_pairs, most_alike

Units = tuple[Tensor, Tensor]
"""b [r, out] and a [r, in] in float64."""


@dataclass
class Pleas(Merge):
    ratio: float = 0.5
    """Share of the pairs that stays separate (paper: as much as a budget of 1 to 2 allows)."""
    units: Literal["canonical", "stored"] = "canonical"
    """Of the balanced singular form, or those of the factors as they are."""
    least_squares: bool = False
    """Fit A to data afterwards; needs Grams. Weights then say how much an input's data counts, and
    must not be negative."""
    ridge: float = 1e-4
    """Of the fit, a share of the Grams' mean diagonal; it draws towards the mean."""

    def __post_init__(self) -> None:
        check_choices(self, "pleas")
        if not 0 <= self.ratio <= 1:
            raise PlaitError(f"pleas: ratio is a share in [0, 1], not {self.ratio}.")
        self.needs = frozenset({"gram"}) if self.least_squares else frozenset()

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        merged = merge_units(self._units(lows[0]), self._units(lows[1]), weights, self.ratio)
        B, A = merged[0].mT, merged[1]
        if self.least_squares:
            fit = RegMean(shrink=1.0, ridge=self.ridge).merge(lows, weights, changes)
            A = (torch.linalg.pinv(B) @ fit.B.double() * fit.scale) @ fit.A.double()
        return LowRank(B, A).to(dtype=changes.dtype)

    def _units(self, low: LowRank) -> Units:
        if self.units == "canonical":
            U, S, V = triplets(low)
            return (U * S.sqrt()).mT, (V * S.sqrt()).mT
        root = abs(low.scale) ** 0.5
        b = low.B.double().mT * (root if low.scale >= 0 else -root)
        return b, low.A.double() * root


def merge_units(one: Units, two: Units, weights: Sequence[float], ratio: float) -> Units:
    """Merged pairs, then what is left of either: units whose products' sum is the merge."""
    parts = [
        (b if w >= 0 else -b, a, abs(float(w)))
        for (b, a), w in zip((one, two), weights, strict=True)
    ]
    (b1, a1, w1), (b2, a2, w2) = parts
    left, right = b1 @ b2.mT, a1 @ a2.mT
    rows, columns = best_pairs(left * right)
    alike = most_alike((left * right)[rows, columns], ratio)
    rows, columns = rows[alike], columns[alike]
    sign = torch.where((left + right)[rows, columns] < 0, -1.0, 1.0).to(b1)[:, None]
    total = w1 + w2
    p, q = (w1 / total, w2 / total) if total else (0.0, 0.0)
    b = p * b1[rows] + q * sign * b2[columns]
    a = p * a1[rows] + q * sign * a2[columns]
    alone1, alone2 = (_others(n, len(x)) for n, x in ((rows, b1), (columns, b2)))
    return (
        torch.cat([total * b, w1 * b1[alone1], w2 * b2[alone2]]),
        torch.cat([a, a1[alone1], a2[alone2]]),
    )


def _others(taken: Tensor, count: int) -> Tensor:
    free = torch.ones(count, dtype=torch.bool)
    free[taken] = False
    return free


METHOD = MergeMethod(
    name="pleas",
    title="PLeaS: rank units paired, alike ones merged, the others kept",
    paper="Nasery et al., 2024, arXiv 2407.02447",
    merge=Pleas,
    inputs=2,
)
