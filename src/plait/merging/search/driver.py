"""`search`: the coefficients of attached adapters that a method finds good for some tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from plait.merging.search.found import Found
from plait.merging.search.method import SearchMethod, get_search_method, make_search
from plait.merging.search.objectives import Batch, Logits, Objective
from plait.merging.search.packages import require
from plait.merging.search.problem import Metric, Problem, Score
from plait.merging.search.trials import Place, as_log
from plait.statistics.gradients import Loss


def search(
    model: nn.Module,
    names: Sequence[str],
    method: str | SearchMethod,
    data: Mapping[str, Sequence[Batch]] | Sequence[Batch] | None = None,
    *,
    loss: Loss | None = None,
    logits: Logits | None = None,
    objective: Objective | None = None,
    metrics: Mapping[str, Metric] | None = None,
    scores: Score | None = None,
    budget: int | None = None,
    seed: int = 0,
    log: Place = None,
    progress: bool = False,
    **options: Any,
) -> Found:
    """Coefficients for the adapters `names` of the model; nothing is merged on the way.

    Args:
        method: a name from `plait methods --merge`, or a `SearchMethod`.
        data: batches (dicts of keyword arguments for the model), {task: batches} for several tasks.
            Labelled or not, as the method wants; of `expert-merging` the tasks are the adapters.
        loss: `loss(model, batch) -> scalar`; None takes `model(**batch).loss`.
        logits: `logits(model, batch, task)`, for models with a head for each task.
        objective: `objective(model, step) -> scalar` to lower, in place of the loss on `data`.
        metrics: {task: metric(model) -> number, the greater the better}, for fronts.
        scores: `scores(model) -> [n]` in [0, 1], one for each example, for evolution.
        budget: evaluations of the model at a point; None leaves it to the method's options.
        seed: of methods that draw, and of the order of batches.
        log: a file of all trials, from which a search that was killed goes on.
        progress: show a bar on stderr.
        **options: the method's own.

    Raises PlaitError for an unknown method or option (naming the nearest), for what the method
    wants and is not given, and for a package that is not installed.
    """
    chosen = get_search_method(method) if isinstance(method, str) else method
    way = make_search(chosen, options)
    if budget is not None:
        way = way.within(budget)
    require(*way.packages)
    tasks = data if isinstance(data, Mapping) else {"data": data or []}
    place = as_log(log)
    problem = Problem(
        model,
        list(names),
        tasks,
        loss,
        logits,
        objective,
        metrics or {},
        scores,
        seed,
        dataclasses.replace(place, progress=progress or place.progress),
    )
    return way.find(problem)
