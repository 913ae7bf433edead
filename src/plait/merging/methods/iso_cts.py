"""Iso-CTS: directions that the inputs share, and some that each has for itself, all made even.

    sum_i w_i dW_i = U S V^T of rank R         s = floor(common R) leading triplets are the shared
    w_i dW_i - U_s U_s^T w_i dW_i              its (R - s) / k leading triplets are input i's own
    U* = polar of all left vectors, V* of all right ones         dW = scale * U* mean(S..) V*^T

Iso-C flattens what survives in the sum; what one input alone has may be small there and drowns.
Here a part of the directions is kept for that. Exact in factors, of rank R at most.
Paper: Marczak et al., 2025, arXiv 2502.04959. Departures: R is the rank that is there, not the
matrix's shorter side; the polar factor is damped; weights default to 1 / k, so that the paper's sum
is scale = k; biases and norms take the weighted mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import MergeMethod
from plait.merging.methods._spectral import SpectralMerge, Triplets, assembled, triplets
from plait.merging.methods.iso_c import check_flatten, flattened


@dataclass
class IsoCts(SpectralMerge):
    common: float = 0.8
    """Share of the directions that the weighted sum gives (paper: 0.8)."""
    flatten: float = 1.0
    """How far singular values go to their mean: 1 is the paper's, 0 leaves them."""
    damping: float = 1e-3
    """Of the polar factors, as in TSV-Merge; 0 is the paper's."""
    scale: float = 1.0
    """Factor on the result (paper: swept from 0.5 to 2 on the sum of tasks)."""

    def __post_init__(self) -> None:
        check_flatten("iso-cts", self.flatten)
        if not 0 <= self.common <= 1:
            raise PlaitError(f"iso-cts: common is a share in [0, 1], not {self.common}.")

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        U, S, V = triplets(LowRank.weighted_sum(lows, weights))
        shared = math.floor(self.common * len(S) + 1e-6)
        own = (len(S) - shared) // len(lows)
        parts: list[Triplets] = [(U[:, :shared], S[:shared], V[:, :shared])]
        for low, weight in zip(lows, weights, strict=True) if own else ():
            u, s, v = triplets(_outside(U[:, :shared], low * weight), float(S[0]))
            parts.append((u[:, :own], s[:own], v[:, :own]))
        lengths = [len(s) for _, s, _ in parts]
        even = self.scale * flattened(torch.cat([s for _, s, _ in parts]), self.flatten)
        evened = [(u, s, v) for (u, _, v), s in zip(parts, even.split(lengths), strict=True)]
        return assembled(evened, self.damping, changes.dtype)


def _outside(U: Tensor, low: LowRank) -> LowRank:
    """The change without its part in the columns of U."""
    B = low.B.double()
    return LowRank(B - U @ (U.mT @ B), low.A.double(), low.scale)


METHOD = MergeMethod(
    name="iso-cts",
    title="Iso-CTS: shared and own directions with a flat spectrum",
    paper="Marczak et al., 2025, arXiv 2502.04959",
    merge=IsoCts,
    whole={"flatten": 0.0, "common": 1.0},
)
