"""Karcher mean: the middle of many changes on the sphere, with the mean of their norms.

    u_i = dW_i / |dW_i|      a_i = w_i / sum w      u: sum_i a_i log_u(u_i) = 0
    dW = (sum_i w_i |dW_i|) u

For two inputs it is slerp's arc. The fixed point u <- exp_u(sum_i a_i log_u(u_i)) runs on
coefficients in the span of the u_i, where their cosines are all that is needed: k numbers a step,
whatever the matrix's size, and the result is a weighted sum, exact in factors. Where the u_i cancel
out (opposite inputs) no mean is defined; the changes are then added up with their weights.
Paper: Karcher, 1977, as used for weights by mergekit, Goddard et al., 2024, arXiv 2403.13257.
Departure: iterated until it stands still, in float64; changes, not full weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.merging.method import MergeMethod
from plait.merging.methods._lines import LineMerge, cosines

CANCELLED = 1e-6
"""Length of the mean of unit vectors below which they count as opposite."""


@dataclass
class Karcher(LineMerge):
    iterations: int = 100
    """At most; a few are enough unless the changes point far apart (mergekit: 10)."""
    tolerance: float = 1e-10
    """Length of a step, in radians, at which the mean stands still (mergekit: 1e-5)."""

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        total = float(weights.sum())
        if bool((weights < 0).any()) or total == 0:
            raise PlaitError("karcher: weights must be 0 or more, and not all 0.")
        cosine, norms = cosines(gram)
        share = torch.where(norms > 0, weights, 0)
        share = share / share.sum(-1, keepdim=True).clamp_min(1e-300)
        length = _length(share, cosine)
        apart = length > CANCELLED
        u = share / torch.where(apart, length, 1)
        for _ in range(self.iterations):
            u, moved = _step(u, share, cosine)
            if float(torch.where(apart, moved, 0).max()) < self.tolerance:
                break
        size = (weights * norms).sum(-1, keepdim=True)
        mean = size * u / torch.where(norms > 0, norms, 1)
        return torch.where(apart, mean, weights)


def _length(u: Tensor, cosine: Tensor) -> Tensor:
    """|sum_i u_i e_i| [n, 1] of coefficients [n, k] on unit vectors with these cosines."""
    return torch.einsum("ni,nij,nj->n", u, cosine, u).clamp_min(0).sqrt()[:, None]


def _step(u: Tensor, share: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """The mean one exponential map on, and the length of the step [n, 1]."""
    towards = torch.einsum("nij,nj->ni", cosine, u).clamp(-1, 1)
    angle = towards.arccos()
    pull = share * torch.where(angle > 1e-7, angle / angle.sin().clamp_min(1e-12), 1)
    tangent = pull - (pull * towards).sum(-1, keepdim=True) * u
    step = _length(tangent, cosine)
    ahead = torch.where(step > 0, step.sin() / torch.where(step > 0, step, 1), 1)
    turned = step.cos() * u + ahead * tangent
    length = _length(turned, cosine)
    return turned / torch.where(length > 0, length, 1), step


METHOD = MergeMethod(
    name="karcher",
    title="Karcher mean: the middle of many changes on the sphere",
    paper="Karcher, 1977; mergekit, Goddard et al., 2024, arXiv 2403.13257",
    merge=Karcher,
)
