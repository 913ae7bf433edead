"""Quadratic surrogates of several metrics over coefficients, and the front between them.

    metric_t(c) ~ link(c^T A_t c + b_t^T c + e_t)      (n + 1)(n + 2) / 2 unknowns for n numbers c

The fit is linear least squares of what lies under the link, then a few steps of Gauss-Newton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from plait.errors import PlaitError, unknown
from plait.merging.search.packages import require

Solver = Literal["own", "nsga3"]
Link = Literal["identity", "sigmoid", "softplus"]
EDGE = 1e-3
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
    held_out_r2: float
    """The same of each point predicted without itself; NaN where there are no points to spare."""
    errors: Tensor
    """[S]: what each point is off by, predicted without itself."""

    def __call__(self, points: Tensor) -> Tensor:
        """The metric at points [S, n]."""
        return _linked(_features(points) @ self.solution, self.link)


def fit_quadratic(
    points: Tensor,
    values: Tensor,
    link: Link = "identity",
    *,
    ridge: float = 1e-10,
    edge: float = EDGE,
    refine: int = 5,
) -> Quadratic:
    """The least-squares quadratic through values [S] at points [S, n].

    `ridge` is a share of the mean squared feature. With a link the fit starts from the linear one
    of what lies under it, shares being kept `edge` away from 0 and 1, and takes `refine` steps of
    Gauss-Newton towards the least squares of the values themselves. Errors without a point are
    exact for "identity", and to first order under a link. PlaitError for fewer points than
    unknowns.
    """
    points, values = points.double(), values.double()
    if len(points) < terms(points.shape[1]):
        raise PlaitError(
            f"{len(points)} points for {terms(points.shape[1])} unknowns; evaluate more."
        )
    X = _features(points)
    damp = (ridge * X.square().mean() * len(X)).sqrt() * torch.eye(X.shape[1], dtype=X.dtype)
    solution = _solve(X, _under(values, link, edge), damp)
    for _ in range(refine if link != "identity" else 0):
        step = _gauss_newton(X, values, solution, link, damp)
        if step is None:
            break
        solution = step
    off = values - _linked(X @ solution, link)
    Q = torch.linalg.qr(torch.cat([_slope(X @ solution, link)[:, None] * X, damp])).Q[: len(X)]
    spare = (1 - Q.square().sum(1)).clamp_min(1e-9)
    errors, spread = off / spare, (values - values.mean()).square().sum()
    return Quadratic(
        solution,
        link,
        _explained(off, spread),
        _explained(errors, spread) if len(X) > X.shape[1] else math.nan,
        errors,
    )


def _under(values: Tensor, link: Link, edge: float) -> Tensor:
    """What lies under the link."""
    if link == "sigmoid":
        return values.clamp(edge, 1 - edge).logit()
    return values.clamp_min(1e-6).expm1().log() if link == "softplus" else values


def _linked(under: Tensor, link: Link) -> Tensor:
    if link == "sigmoid":
        return under.sigmoid()
    return torch.nn.functional.softplus(under) if link == "softplus" else under


def _slope(under: Tensor, link: Link) -> Tensor:
    if link == "sigmoid":
        return under.sigmoid() * (1 - under.sigmoid())
    return under.sigmoid() if link == "softplus" else torch.ones_like(under)


def _solve(X: Tensor, target: Tensor, damp: Tensor, past: Tensor | None = None) -> Tensor:
    """Least squares with a ridge around 0 (of steps: around minus where they start)."""
    below = target.new_zeros(len(damp)) if past is None else -(damp @ past)
    return torch.linalg.lstsq(torch.cat([X, damp]), torch.cat([target, below])).solution


def _gauss_newton(
    X: Tensor, values: Tensor, solution: Tensor, link: Link, damp: Tensor
) -> Tensor | None:
    """A solution of less squared error, or None."""

    def error(at: Tensor) -> float:
        fitted = (values - _linked(X @ at, link)).square().sum()
        return float(fitted + (damp @ at).square().sum())

    under = X @ solution
    J = _slope(under, link)[:, None] * X
    step = _solve(J, values - _linked(under, link), damp, solution)
    least = error(solution)
    for halving in range(6):
        there = solution + step * 0.5**halving
        if error(there) < least:
            return there
    return None


def _explained(off: Tensor, spread: Tensor) -> float:
    return float(1 - off.square().sum() / spread) if spread > 0 else 1.0


def nondominated(values: Tensor) -> Tensor:
    """Which rows of values [S, t] (the greater the better) no other row dominates: [S], bool."""
    as_good = torch.ones(len(values), len(values), dtype=torch.bool)
    for column in values.T:  # a column at a time: reductions over a short last axis are slow
        as_good &= column[None] >= column[:, None]
    return ~(as_good & ~as_good.T).any(1)


def front(
    metrics: Sequence[Quadratic],
    bounds: tuple[Tensor, Tensor],
    *,
    size: int = 100,
    generations: int = 60,
    solver: Solver = "own",
    seed: int = 0,
) -> Tensor:
    """Points [at most size, n] within the bounds that none of each other dominates.

    By evolution on the surrogates alone. "own": parents on the front are crossed and shifted by
    steps that shrink, the non-dominated stay, and where there are too many the most crowded go.
    "nsga3": NSGA-III of the package pymoo (extra `search`). Each metric's best point always stays.
    """
    if solver not in get_args(Solver):
        raise unknown("solver", solver, get_args(Solver))
    run = _nsga3 if solver == "nsga3" and len(metrics) > 1 else _evolved
    points = run(metrics, bounds, size, generations, seed)
    values = torch.stack([metric(points) for metric in metrics], 1)
    kept = nondominated(values)
    points, values = points[kept], values[kept]
    return points[_spread(values, size)]


def _evolved(
    metrics: Sequence[Quadratic],
    bounds: tuple[Tensor, Tensor],
    size: int,
    generations: int,
    seed: int,
) -> Tensor:
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
    return points


def _nsga3(
    metrics: Sequence[Quadratic],
    bounds: tuple[Tensor, Tensor],
    size: int,
    generations: int,
    seed: int,
) -> Tensor:
    """The paper's settings: crossover SBX (eta 20), polynomial mutation (eta 20)."""
    require("pymoo")
    from pymoo.algorithms.moo.nsga3 import NSGA3
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.optimize import minimize
    from pymoo.util.ref_dirs import get_reference_directions as directions

    class Surrogates(Problem):
        def __init__(self) -> None:
            least, most = (edge.numpy() for edge in bounds)
            super().__init__(n_var=len(least), n_obj=len(metrics), xl=least, xu=most)

        def _evaluate(self, x: Any, out: Any, *args: Any, **kwargs: Any) -> None:
            points = torch.as_tensor(x, dtype=torch.float64)
            out["F"] = -torch.stack([metric(points) for metric in metrics], 1).numpy()

    count = len(metrics)
    even = directions("das-dennis", count, n_partitions=size - 1) if count == 2 else None
    algorithm = NSGA3(
        ref_dirs=directions("energy", count, size, seed=seed + 1) if even is None else even,
        pop_size=size,
        crossover=SBX(eta=20, prob=0.7),
        mutation=PM(eta=20, prob=0.3),
    )
    found = minimize(Surrogates(), algorithm, ("n_gen", generations), seed=seed + 1)
    return torch.as_tensor(found.pop.get("X"), dtype=torch.float64)


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
