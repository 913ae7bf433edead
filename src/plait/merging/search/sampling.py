"""Where to evaluate: points that cover a box, and points where a surrogate was most wrong.

In polar coordinates around the box's least corner, a direction is n - 1 angles in [0, pi / 2].
Those are cut into bins; a bin's score is mean + explore * std of the squared errors of the points
in it, as a share of the greatest; bins are drawn by softmax(score / temperature), and in one of
them a direction, with a radius of 0.2 to 0.8 of the box's side. (Bayesian MAP, arXiv 2406.07529.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Box = tuple[float, float]
RADIUS = (0.2, 0.8)


def cover(n: int, count: int, box: Box, seed: int) -> Tensor:
    """The box's origin, each number alone, then a low-discrepancy sequence: [count, n]."""
    alone = torch.cat([torch.zeros(1, n), torch.eye(n)]).double()
    rest = torch.quasirandom.SobolEngine(n, scramble=True, seed=seed).draw(count).double()
    return box[0] + (box[1] - box[0]) * torch.cat([alone, rest])[:count]


def angles(u: Tensor) -> Tensor:
    """[S, n - 1] in [0, pi / 2] of points u [S, n] without negative numbers."""
    tails = u.square().flip(1).cumsum(1).flip(1).sqrt()
    return torch.atan2(tails[:, 1:], u[:, :-1])


def from_angles(phi: Tensor, radius: Tensor) -> Tensor:
    """u [S, n] of angles [S, n - 1] and radii [S]."""
    one = torch.ones(len(phi), 1, dtype=phi.dtype)
    sines = torch.cat([one, phi.sin().cumprod(1)], 1)
    return radius[:, None] * sines * torch.cat([phi.cos(), one], 1)


def where_wrong(
    points: Tensor,
    errors: Tensor,
    count: int,
    box: Box,
    draw: torch.Generator,
    *,
    bins: int = 4,
    explore: float = 0.5,
    temperature: float = 0.07,
) -> Tensor:
    """[count, n] new points in the box, for squared errors [S, T] of T surrogates at points [S, n].

    The surrogates take turns. Only bins that hold a point are drawn.
    """
    u = (points - box[0]) / (box[1] - box[0])
    inside = u.norm(dim=1) > 1e-9  # the corner itself lies in no direction
    u, errors = u[inside], errors[inside]
    cells = (angles(u) / (math.pi / 2) * bins).long().clamp_max(bins - 1)
    known, which = torch.unique(cells, dim=0, return_inverse=True)
    chances = [_chances(error, which, len(known), explore, temperature) for error in errors.T]
    found = []
    for number in range(count):
        cell = known[int(torch.multinomial(chances[number % len(chances)], 1, generator=draw))]
        share = torch.rand(len(cell), generator=draw, dtype=torch.float64)
        r = torch.rand(1, generator=draw, dtype=torch.float64)
        phi = (cell + share) / bins * (math.pi / 2)
        found.append(from_angles(phi[None], RADIUS[0] + (RADIUS[1] - RADIUS[0]) * r)[0])
    return box[0] + (box[1] - box[0]) * torch.stack(found)


def _chances(
    errors: Tensor, which: Tensor, bins: int, explore: float, temperature: float
) -> Tensor:
    """[bins], adding up to 1."""
    zero = errors.new_zeros(bins)
    count = zero.index_add(0, which, torch.ones_like(errors))
    mean = zero.index_add(0, which, errors) / count
    spread = zero.index_add(0, which, (errors - mean[which]).square()) / count
    score = mean + explore * spread.sqrt()
    most = score.max()
    return (score / most / temperature).softmax(0) if most > 0 else torch.full_like(zero, 1 / bins)
