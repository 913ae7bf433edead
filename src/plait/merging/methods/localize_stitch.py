"""Localize-and-Stitch: of every change its few important parts, averaged only where they meet.

    m_i   the largest `density` of dW_i, or a learned mask (`plait.merging.localize`)
    dW = sum_i k w_i m'_i * dW_i,   m'_i = m_i / sum_j m_j entry by entry, 0 where none is

Where masks are disjoint, changes are summed and none dilutes another. In space `factors` the parts
are rank units, the singular triplets of dW_i, of which a mask says which stay. Inputs share no
units as they share entries, so m_j becomes the share of a unit that the kept units of input j span,
sum_b (u . u_b)^2 (v . v_b)^2: 1 for a copy, 0 for an orthogonal one, m_j itself if units were
entries. In `aligned` parts are entries of coordinates in a basis that the inputs share; both give
low rank and do not depend on how factors are turned. `delta` is the paper, with masks of entries.
Statistics: a mask for each input where `masks="learned"`, of units or of entries by the space.
Paper: He et al., 2024, arXiv 2408.13656. Departures: the largest are chosen site by site (with
masks from `localize`, over all sites, as in the paper), weights (1 / k is the paper), and an input
that does not act at a site does not count there. Biases take the weighted sum with learned masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter.choices import check_choices
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.masks import unpack
from plait.merging.method import Merge, MergeMethod
from plait.merging.methods._spectral import Triplets, triplets
from plait.merging.methods._trim import check_density, thresholds


@dataclass
class LocalizeStitch(Merge):
    density: float = 0.1
    """Share of the entries, or of the rank units (one at least), that stay of each input (paper:
    0.01 to 0.1 of the entries); learned masks have their own."""
    masks: Literal["magnitude", "learned"] = "magnitude"
    """Keep the largest, without data, or what the statistics say."""
    scale: float = 1.0
    """Factor on the result."""

    def __post_init__(self) -> None:
        check_density("localize-stitch", self.density)
        check_choices(self, "localize-stitch")
        learned = self.masks == "learned"
        self.needs = frozenset({"mask"}) if learned else frozenset()
        self.spaces = ("factors", "delta") if learned else ("factors", "aligned", "delta")

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        kept = self._kept([triplets(low) for low in lows], changes)
        parts = []
        for (U, S, V), weight in zip(kept, weights, strict=True):
            shared = torch.zeros_like(S)
            for U_j, _, V_j in kept:
                shared += ((U.mT @ U_j) * (V.mT @ V_j)).square().sum(1)
            B = U * (len(lows) * weight * self.scale * S / shared)
            parts.append(LowRank(B, V.mT).to(dtype=changes.dtype))
        return LowRank.weighted_sum(parts, [1.0] * len(parts))

    def _kept(self, units: Sequence[Triplets], changes: Changes) -> list[Triplets]:
        """The triplets that stay; S is in descending order."""
        if self.masks == "learned":
            masks = [
                unpack(mask, (len(S),), changes.path)
                for (_, S, _), mask in zip(units, changes.known("mask"), strict=True)
            ]
        else:
            count = [max(1, math.floor(self.density * len(S) + 1e-6)) for _, S, _ in units]
            masks = [torch.arange(len(S)) < n for (_, S, _), n in zip(units, count, strict=True)]
        return [(U[:, m], S[m], V[:, m]) for (U, S, V), m in zip(units, masks, strict=True)]

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        """The least magnitude that stays, [k, 1, 1], or bool masks [k, out, in]."""
        if self.masks == "learned":
            known = changes.known("mask")
            return torch.stack([unpack(mask, changes.shape, changes.path) for mask in known])
        acts = torch.zeros(changes.k, 1, 1, dtype=torch.bool)
        for block in changes.blocks():
            acts |= (block != 0).flatten(1).any(1)[:, None, None]
        least = thresholds(changes, self.density)
        if self.density < 1:  # zeros that fill up a share are not what an input changes
            least = least.clamp_min(torch.finfo(torch.float32).smallest_normal)
        return torch.where(acts, least, torch.inf)

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        if found.dtype == torch.bool:
            masks = found[:, rows.start : rows.stop]
        else:
            masks = block.abs().float() >= found
        stitched = (weights * block * masks).sum(0) * (len(block) * self.scale)
        return stitched / masks.sum(0).clamp_min(1)


METHOD = MergeMethod(
    name="localize-stitch",
    title="Localize-and-Stitch: important parts alone, averaged only where they meet",
    paper="He et al., 2024, arXiv 2408.13656",
    merge=LocalizeStitch,
    whole={"density": 1.0},
)
