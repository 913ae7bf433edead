"""Searches of coefficients on the same rows: every one asks about as many rows in all as tuning a
merge does.

    evaluations x rows of an evaluation = budget x validation rows

A search that looks more often looks at fewer rows each time. Those that take a new batch a step see
all rows in turn, the others the same few. The result is merged to one adapter and asked like any.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.merging.bench import Bench, Line
from benchmarks.merging.contenders import SEARCHES
from benchmarks.merging.measure import changes, score_all
from benchmarks.merging.scorer import batches
from benchmarks.merging.statistics import attached
from torch import Tensor, nn

IN_TURN = {"adamerging", "expert-merging", "lora-soups"}


def search_labels() -> list[str]:
    """Searches that the library has and that have a place in `SEARCHES`."""
    from plait.merging.search.method import search_method_names

    return [name for name in search_method_names() if name in SEARCHES]


def search_row(bench: Bench, name: str) -> Line:
    """A search's line of results."""
    from plait.merging.search.driver import search

    evaluations, options = SEARCHES[name]
    held = bench.validation_rows
    each = max(1, bench.budget * min(map(len, held.values())) // evaluations)
    data = {task: batches(rows if name in IN_TURN else rows[:each], each) for task, rows in
            held.items()}  # fmt: skip
    start = time.process_time()
    with attached(bench) as names:
        found = search(
            bench.scorer,
            names,
            name,
            data,
            logits=lambda model, batch, task: model(**batch).logits,
            metrics={task: _accuracy(here) for task, here in data.items()},
            scores=_right(data),
            budget=evaluations,
            seed=0,
            **options,
        )
        merged = found.merged()
    spent = time.process_time() - start
    change = changes(merged)
    return {
        "label": name,
        "method": name,
        "evaluations": evaluations,
        "rows_an_evaluation": each * len(held),
        "merge_s": None,
        "tuning_s": round(spent, 1),
        "rank": max(low.rank for low in change.values()),
        "needs": ["rows"],
        "tasks": score_all(bench.scorer, bench.test, change),
    }


def _accuracy(here: list[dict[str, Tensor]]) -> Callable[[nn.Module], float]:
    return lambda model: float(_hits(model, here).mean())


def _right(data: dict[str, list[dict[str, Tensor]]]) -> Callable[[nn.Module], Tensor]:
    everything = [batch for here in data.values() for batch in here]
    return lambda model: _hits(model, everything)


@torch.no_grad()
def _hits(model: Any, here: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([(model(**b).logits.argmax(1) == b["labels"]).double() for b in here])
