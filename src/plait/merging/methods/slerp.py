"""Slerp: from one change to another along the arc between them, their norms interpolated.

    t = w_2 / (w_1 + w_2)      theta = angle between dW_1 and dW_2
    dW = n (sin((1 - t) theta) dW_1 / |dW_1| + sin(t theta) dW_2 / |dW_2|) / sin theta

n = (1 - t) |dW_1| + t |dW_2| in the default form; `norms="plain"` interpolates the changes as they
are (the usual code's, whose norm between the ends is not the arc's). Both are weighted sums whose
factors follow from three inner products, so adapters are never multiplied out. Changes that are
(nearly) parallel or opposite, or 0, are interpolated linearly. Each site for itself; two inputs.
Paper: Shoemake, 1985 (quaternion curves), as used for weights by mergekit and others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.merging.method import MergeMethod
from plait.merging.methods._lines import LineMerge, cosines


@dataclass
class Slerp(LineMerge):
    norms: Literal["interpolated", "plain"] = "interpolated"
    """Interpolate directions and norms apart, or the changes themselves."""
    parallel: float = 0.9995
    """Cosine from which two changes (or lines) count as parallel (or opposite)."""

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        if gram.shape[-1] != 2 or float(weights.sum()) == 0:
            raise PlaitError("slerp: give two inputs, whose weights do not add up to 0.")
        t = weights[1] / weights.sum()
        found, norms = cosines(gram)
        cosine = found[:, 0, 1].clamp(-1, 1)
        straight = (cosine.abs() > self.parallel) | ~norms.bool().all(-1)
        angle = torch.where(straight, torch.pi / 2, cosine.arccos())
        ends = torch.stack([1 - t, t])
        arc = torch.sin(ends * angle[:, None]) / angle.sin()[:, None]
        if self.norms == "interpolated":
            arc = arc * (ends * norms).sum(-1, keepdim=True) / torch.where(norms > 0, norms, 1)
        return torch.where(straight[:, None], ends, arc)


METHOD = MergeMethod(
    name="slerp",
    title="Slerp: spherical interpolation of two changes",
    paper="Shoemake, 1985; mergekit",
    merge=Slerp,
    inputs=2,
)
