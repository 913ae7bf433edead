"""Run the bake-offs, in pieces, and write the page: `python -m benchmarks.which_method --help`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.which_method.contenders import (
    ALWAYS,
    FINALISTS,
    LENGTHS,
    METHODS,
    SMOKE,
)
from benchmarks.which_method.page import RESULTS, mean_ranks, summary, write_page
from benchmarks.which_method.tasks import ROOT, TASKS

from plait.study import compare
from plait.study.planning import parse_budget

RUNS = ROOT / "runs" / "which-method"
LAST = "home"
"""The language model's task: for the finalists of the others."""


class BudgetSpent(Exception):
    """The CPU time of this piece is used up; what is finished is kept."""


class Meter:
    """Says what is done, and stops between two trials when the CPU time is spent."""

    def __init__(self, budget: float) -> None:
        self.budget = budget

    def __call__(self, event: Any) -> None:
        used = time.process_time()
        print(f"[{used:6.0f} CPU s] {event.text}", file=sys.stderr, flush=True)
        if used > self.budget:
            raise BudgetSpent


def finalists(results: Path = RESULTS) -> list[str]:
    """The methods for the language model: LoRA, and the best by mean rank on the other tasks."""
    found = [json.loads((results / f"{n}.json").read_text()) for n in TASKS if n != LAST]
    ranked = mean_ranks(found)
    best = [label for label in sorted(ranked, key=lambda n: ranked[n]) if label not in ALWAYS]
    return [*ALWAYS, *best[: FINALISTS - len(ALWAYS)]]


def run_task(name: str, meter: Meter, smoke: bool, methods: Sequence[str]) -> None:
    """One bake-off, or what is left of it; its summary goes to benchmarks/results."""
    length = SMOKE if smoke else LENGTHS[name]
    task = TASKS[name]()
    found = compare(
        task,
        list(methods),
        output=RUNS / (f"smoke-{name}" if smoke else name),
        steps=5 if smoke else task.recipe.steps,
        trials=length.trials,
        seeds=length.seeds,
        budget=length.budget,
        grid=smoke,
        progress=meter,
    )
    folder = RUNS / "smoke-results" if smoke else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary(found, torch.get_num_threads()), indent=1, allow_nan=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(f"{name}: {found.advice}\n  {found.report}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.which_method")
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; all")
    parser.add_argument("--cpu-budget", help="of this piece, over all threads: 30m, 2h")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", help="others than the fixed list (for trying out)")
    parser.add_argument("--smoke", action="store_true", help="a few steps; nothing is published")
    given = parser.parse_args(arguments)
    results = RUNS / "smoke-results" if given.smoke else RESULTS
    if given.what == "page":
        print(write_page(results, RUNS if given.smoke else ROOT / "docs"))
        return 0
    torch.set_num_threads(given.threads)
    meter = Meter(parse_budget(given.cpu_budget))
    try:
        for name in given.tasks or TASKS:
            named = given.methods.split(",") if given.methods else None
            missing = name == LAST and named is None
            chosen = named or (finalists(results) if missing else METHODS)
            run_task(name, meter, given.smoke, chosen)
    except BudgetSpent:
        print("the CPU time of this piece is spent; the same command goes on", file=sys.stderr)
        return 75  # EX_TEMPFAIL: try again
    return 0


if __name__ == "__main__":
    sys.exit(main())
