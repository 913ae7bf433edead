"""TIES' second and third step: a sign for every entry, and the mean of those that agree with it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Sign = Literal["sum", "count"]
Reduce = Literal["mean", "sum", "max"]


def elect(block: Tensor, weights: Tensor, sign: Sign = "sum", reduce: Reduce = "mean") -> Tensor:
    """The entries [k, rows, in] merged into [rows, in], disjointly.

    The sign of an entry is that of the weighted sum ("sum", by mass) or of the number of weighted
    changes on either side ("count"); a tie is positive. Only changes of that sign count: their
    weighted mean (over the weights of those that agree and are not 0), their weighted sum, or the
    largest of them.
    """
    # Products and clamps throughout: selecting with torch.where costs several times as much.
    weighted = weights * block
    mass = weighted if sign == "sum" else weighted.sign()
    elected = torch.where(mass.sum(0) >= 0, 1.0, -1.0).to(block.dtype)
    signed = weighted * elected
    agreeing = signed.clamp_min(0)
    if reduce == "sum":
        return elected * agreeing.sum(0)
    if reduce == "max":
        return elected * agreeing.amax(0)
    mass_of_weights = ((signed > 0) * weights.abs()).sum(0)
    tiny = torch.finfo(block.dtype).tiny
    return elected * agreeing.sum(0) / mass_of_weights.clamp_min(tiny)
