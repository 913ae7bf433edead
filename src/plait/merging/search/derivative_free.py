"""Searching coefficients by values alone: Nelder-Mead, CMA-ES, or random points."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from plait.errors import PlaitError, unknown
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.found import Found, Penalty
from plait.merging.search.objectives import Objective
from plait.merging.search.packages import require
from plait.merging.search.trials import Place, as_log

Optimizer = Literal["nelder-mead", "cma", "random"]
Ask = Callable[[Any], float]


class _Spent(Exception):
    """The evaluations are used up."""


def minimise(
    space: Coefficients,
    objective: Objective,
    *,
    evaluations: int = 40,
    optimizer: Optimizer = "nelder-mead",
    spread: float = 0.5,
    penalty: Penalty | None = None,
    seed: int = 0,
    log: Place = None,
) -> Found:
    """The best of at most `evaluations` points, the start among them.

    Args:
        objective: called with step 0 every time, since values at several points are compared.
        optimizer: "nelder-mead" (up to about ten numbers), "cma" (two numbers at least) or "random"
            (uniform within the bounds, or normal around the start); the first two are of the extra
            `search`.
        spread: edge of the first simplex, or standard deviation of the first points.

    The rest as for `descend`. Raises PlaitError for a package that is not installed.
    """
    require(*packages_of(optimizer))
    search = space.described() | {"search": optimizer, "spread": spread, "seed": seed}
    run = {"nelder-mead": _nelder_mead, "cma": _cma, "random": _random}[optimizer]
    trace = as_log(log).open(search, evaluations, "coefficients")
    with space.searching(), torch.no_grad(), trace as trials:

        def value(point: Any) -> float:
            if len(trials.history) >= evaluations:
                raise _Spent
            raw = torch.as_tensor(point, dtype=torch.float64).reshape(space.shape)
            raw = space.project(raw)

            def ask() -> dict[str, Any]:
                c = space.values(raw)
                space.use(c)
                total = objective(space.model, 0)
                return {"value": float(total if penalty is None else total + penalty(c))}

            return trials(raw, ask)["value"]

        with contextlib.suppress(_Spent):
            run(value, space, evaluations, spread, seed)
    best = min(trials.history, key=lambda entry: entry["value"])
    point = torch.tensor(best["point"], dtype=torch.float64)
    return Found(space, space.values(point), best["value"], trials.history)


def packages_of(optimizer: Optimizer) -> tuple[str, ...]:
    """What the optimizer needs beside torch; an error names the nearest for an unknown one."""
    if optimizer not in get_args(Optimizer):
        raise unknown("optimizer", optimizer, get_args(Optimizer))
    return {"nelder-mead": ("scipy",), "cma": ("cma",), "random": ()}[optimizer]


def _nelder_mead(ask: Ask, space: Coefficients, count: int, spread: float, seed: int) -> None:
    from scipy.optimize import minimize

    start = space.start.flatten()
    corners = start.repeat(len(start) + 1, 1)
    corners[1:] += spread * torch.eye(len(start), dtype=start.dtype)
    corners = space.project(corners)
    settings = {
        "maxfev": 10 * count,  # `ask` itself ends the search
        "initial_simplex": corners.numpy(),
        "adaptive": True,
        "xatol": 1e-8,
        "fatol": 1e-12,
    }
    minimize(ask, start.numpy(), method="Nelder-Mead", options=settings)


def _cma(ask: Ask, space: Coefficients, count: int, spread: float, seed: int) -> None:
    import cma

    start = space.start.flatten()
    if len(start) < 2:
        raise PlaitError("cma searches two numbers at least; use 'nelder-mead' for one.")
    settings: dict[str, Any] = {"seed": seed + 1, "verbose": -9}
    if space.bounds is not None:
        settings["bounds"] = list(space.bounds)
    ask(start)
    strategy = cma.CMAEvolutionStrategy(start.tolist(), spread, settings)
    while not strategy.stop():
        points = strategy.ask()
        strategy.tell(points, [ask(point) for point in points])


def _random(ask: Ask, space: Coefficients, count: int, spread: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    ask(space.start)
    for _ in range(count):
        if space.bounds is None:
            noise = torch.randn(space.shape, generator=draw, dtype=torch.float64)
            ask(space.start + spread * noise)
        else:
            least, most = space.bounds
            share = torch.rand(space.shape, generator=draw, dtype=torch.float64)
            ask(least + (most - least) * share)


def evaluate(space: Coefficients, objective: Objective, coefficients: Tensor) -> float:
    """The objective at c [k, g], without gradients."""
    with space.searching(), torch.no_grad():
        space.use(coefficients)
        return float(objective(space.model, 0))
