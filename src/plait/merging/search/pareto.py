"""Quadratic surrogates of several metrics over coefficients, and the front between them.

    metric_t(c) ~ link(c^T A_t c + b_t^T c + e_t)      (n + 1)(n + 2) / 2 unknowns for n numbers c

The link's inverse is applied to what was measured, so that the fit is linear least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.errors import PlaitError

Link = Literal["identity", "sigmoid", "softplus"]
EDGE = 1e-6
"""Shares are kept this far from 0 and 1, where the logit ends."""


def terms(n: int) -> int:
    """How many unknowns a quadratic in n numbers has."""
    return (n + 1) * (n + 2) // 2


def _features(points: Tensor) -> Tensor:
    """Products, the numbers, one: [S, terms]."""
    i, j = torch.triu_indices(points.shape[1], points.shape[1])
    one = points.new_ones(len(points), 1)
    return torch.cat([points[:, i] * points[:, j], points, one], 1)


@dataclass(frozen=True)
class Quadratic:
    """One metric as a quadratic of n numbers, through a link."""

    solution: Tensor
    link: Link
    r2: float
    """1 - residual / variance, of what was fitted."""

    def __call__(self, points: Tensor) -> Tensor:
        """The metric at points [S, n]."""
        value = _features(points) @ self.solution
        if self.link == "sigmoid":
            return value.sigmoid()
        return torch.nn.functional.softplus(value) if self.link == "softplus" else value


def fit_quadratic(
    points: Tensor, values: Tensor, link: Link = "identity", ridge: float = 1e-10
) -> Quadratic:
    """The least-squares quadratic through values [S] at points [S, n].

    `ridge` is a share of the mean squared feature. PlaitError for fewer points than unknowns.
    """
    points, values = points.double(), values.double()
    if len(points) < terms(points.shape[1]):
        raise PlaitError(
            f"{len(points)} points for {terms(points.shape[1])} unknowns; evaluate more."
        )
    if link == "sigmoid":
        seen = values.clamp(EDGE, 1 - EDGE).logit()
    elif link == "softplus":
        seen = values.clamp_min(EDGE).expm1().log()
    else:
        seen = values
    X = _features(points)
    damp = (ridge * X.square().mean() * len(X)).sqrt() * torch.eye(X.shape[1], dtype=X.dtype)
    target = torch.cat([seen, seen.new_zeros(X.shape[1])])
    solution = torch.linalg.lstsq(torch.cat([X, damp]), target).solution
    rest = (X @ solution - seen).square().sum()
    spread = (seen - seen.mean()).square().sum()
    return Quadratic(solution, link, float(1 - rest / spread) if spread > 0 else 1.0)


def nondominated(values: Tensor) -> Tensor:
    """Which rows of values [S, t] (the greater the better) no other row dominates: [S], bool."""
    better = (values[None] >= values[:, None]).all(-1) & (values[None] > values[:, None]).any(-1)
    return ~better.any(1)


def front(
    metrics: Sequence[Quadratic],
    bounds: tuple[Tensor, Tensor],
    *,
    size: int = 100,
    generations: int = 60,
    seed: int = 0,
) -> Tensor:
    """Points [at most size, n] within the bounds that none of each other dominates.

    Evolution on the surrogates alone: parents on the front are crossed and shifted by steps that
    shrink, the non-dominated stay, and where there are too many the most crowded go. Each metric's
    best point always stays.
    """
    least, most = bounds
    draw = torch.Generator().manual_seed(seed)
    width = most - least

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw, dtype=torch.float64)

    points = least + width * uniform(20 * size, len(least))
    for generation in range(generations):
        values = torch.stack([metric(points) for metric in metrics], 1)
        kept = nondominated(values)
        points, values = points[kept], values[kept]
        points = points[_spread(values, size)]
        step = 0.3 * 0.9**generation
        pairs = (uniform(2, 10 * size) * len(points)).long()
        share = uniform(10 * size, 1)
        children = points[pairs[0]] + share * (points[pairs[1]] - points[pairs[0]])
        noise = torch.randn(children.shape, generator=draw, dtype=torch.float64)
        children = (children + step * width * noise).clamp(least, most)
        points = torch.cat([points, children])
    values = torch.stack([metric(points) for metric in metrics], 1)
    kept = nondominated(values)
    points, values = points[kept], values[kept]
    return points[_spread(values, size)]


def _spread(values: Tensor, size: int) -> Tensor:
    """At most `size` rows: each column's greatest, then those farthest from the ones taken."""
    if len(values) <= size:
        return torch.arange(len(values))
    scale = (values.amax(0) - values.amin(0)).clamp_min(1e-12)
    scaled = values / scale
    taken = list(dict.fromkeys(values.argmax(0).tolist()))[:size]
    distance = torch.cdist(scaled, scaled[taken]).amin(1)
    while len(taken) < size:
        taken.append(int(distance.argmax()))
        distance = torch.minimum(distance, (scaled - scaled[taken[-1]]).norm(dim=1))
    return torch.tensor(taken)
