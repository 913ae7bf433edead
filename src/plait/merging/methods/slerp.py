"""Slerp: from one change to another along the arc between them, their norms interpolated.

    t = w_2 / (w_1 + w_2)      theta = angle between dW_1 and dW_2
    dW = n (sin((1 - t) theta) dW_1 / |dW_1| + sin(t theta) dW_2 / |dW_2|) / sin theta

n = (1 - t) |dW_1| + t |dW_2| in the default form; `norms="plain"` interpolates the changes as they
are (the usual code's, whose norm between the ends is not the arc's). Both are weighted sums whose
factors follow from three inner products, so adapters are never multiplied out. Changes that are
(nearly) parallel or opposite are interpolated linearly. Each site for itself; two inputs.
Paper: Shoemake, 1985 (quaternion curves), as used for weights by mergekit and others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.merging.method import MergeMethod
from plait.merging.methods._coefficients import CoefficientMerge


@dataclass
class Slerp(CoefficientMerge):
    norms: Literal["interpolated", "plain"] = "interpolated"
    """Interpolate directions and norms apart, or the changes themselves."""
    parallel: float = 0.9995
    """Cosine from which two changes count as parallel (or opposite)."""

    def __post_init__(self) -> None:
        check_choices(self, "slerp")

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        if len(gram) != 2 or float(weights.sum()) == 0:
            raise PlaitError("slerp: give two inputs, whose weights do not add up to 0.")
        t = weights[1] / weights.sum()
        lengths = gram.diagonal().clamp_min(0).sqrt()
        cosine = gram[0, 1] / lengths.prod() if lengths.prod() > 0 else torch.ones(())
        straight = torch.stack([1 - t, t])
        if abs(float(cosine)) > self.parallel or not lengths.all():
            return straight
        angle = cosine.clamp(-1, 1).arccos()
        arc = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()]) / angle.sin()
        if self.norms == "plain":
            return arc
        return arc * (straight * lengths).sum() / lengths


METHOD = MergeMethod(
    name="slerp",
    title="Slerp: spherical interpolation of two changes",
    paper="Shoemake, 1985; mergekit",
    merge=Slerp,
    inputs=2,
)
