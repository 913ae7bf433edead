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
    # Input by input, in place: what is worked on stays in a cache, and products with clamps cost a
    # fraction of selecting.
    inputs = list(zip(block, weights.flatten().tolist(), strict=True))
    mass = torch.zeros_like(block[0])
    for each, weight in inputs:
        mass += each * weight if sign == "sum" else (each * weight).sign_()
    elected = torch.ones_like(mass).copysign_(mass)
    total, agreed = torch.zeros_like(mass), torch.full_like(mass, torch.finfo(block.dtype).tiny)
    for each, weight in inputs:
        agreeing = (each * elected).mul_(weight).clamp_min_(0)
        if reduce == "max":
            torch.maximum(total, agreeing, out=total)
            continue
        total += agreeing
        if reduce == "mean":
            agreed.add_(agreeing.sign_(), alpha=abs(weight))
    total *= elected
    return total.div_(agreed) if reduce == "mean" else total
