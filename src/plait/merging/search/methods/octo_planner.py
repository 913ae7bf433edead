"""Octo-planner's merge: adapters of several function sets added with one common weight.

    W = W0 + lambda sum_i dW_i,   lambda swept over a few values on queries that need several sets

Equal weights 1 / k starve every skill and weights of 1 overshoot, so the sweep is the method; an
`optimizer` then tunes a weight for each adapter from there. Ranks may differ.
Paper: Chen et al., 2024, arXiv 2406.18082 (which merges with weights that it leaves open).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from plait.errors import PlaitError
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.derivative_free import minimise
from plait.merging.search.found import Found
from plait.merging.search.method import SearchMethod
from plait.merging.search.objectives import Objective
from plait.merging.search.trials import open_trials


def octo_planner(
    model: nn.Module,
    names: Sequence[str],
    objective: Objective,
    *,
    lambdas: Sequence[float] | None = None,
    tune: int = 0,
    optimizer: Literal["nelder-mead", "cma", "random"] = "nelder-mead",
    log: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Found:
    """The best common weight of these attached adapters, then `tune` evaluations around it.

    Args:
        objective: `supervised(batches)` of mixed queries, or any other.
        lambdas: those tried; None is eight steps from 1 / k to 1.
        log: of the sweep; tuning writes beside it, with ".tuned" after the name.
    """
    space = Coefficients(model, names)
    tried = torch.linspace(1 / len(names), 1, 8).tolist() if lambdas is None else list(lambdas)
    if not tried or tune < 0:
        raise PlaitError("octo_planner: give at least one lambda, and tune of at least 0.")
    search = space.described() | {"search": "octo-planner", "lambdas": tried}
    with (
        space.searching(),
        torch.no_grad(),
        open_trials(log, search, len(tried), "octo-planner", progress) as trials,
    ):
        for value in tried:
            c = torch.full(space.shape, value, dtype=torch.float64)

            def ask(c: torch.Tensor = c) -> dict[str, float]:
                space.use(c)
                return {"value": float(objective(model, 0))}

            trials(c, ask)
    best = min(trials.history, key=lambda entry: entry["value"])
    common = torch.tensor(best["point"], dtype=torch.float64)
    swept = Found(space, common, best["value"], trials.history)
    if not tune:
        return swept
    tuned = Coefficients(model, names, start=common)
    beside = None if log is None else f"{os.fspath(log)}.tuned"
    return minimise(
        tuned,
        objective,
        evaluations=tune,
        optimizer=optimizer,
        spread=0.1,
        log=beside,
        progress=progress,
    )


METHOD = SearchMethod(
    name="octo-planner",
    title="Octo-planner: adapters of function sets under one swept weight",
    paper="Chen et al., 2024, arXiv 2406.18082",
    run=octo_planner,
)
