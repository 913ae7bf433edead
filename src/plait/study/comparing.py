"""`compare`: which method is best on this data within this budget? An honest bake-off.

    base scored, every method probed ──► plan ──► rounds of tuning, one learning rate for every
    method in each ──► finals, one seed for every finalist in each ──► report

All methods get the same data, number of steps (or seconds), parameters as nearly as their formulas
allow, learning rates and seeds. A round counts when every method has finished it, so
that running out of time cannot favour one. Learning rates are chosen on validation data, what is
reported was measured on test data with seeds that chose nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.study.contender import Contender, parse_contenders
from plait.study.places import Here, OnRay, Place, Processes
from plait.study.planning import Equal, parse_budget
from plait.study.recipe_task import RecipeTask
from plait.study.results import Comparison
from plait.study.search import Range, import_optuna
from plait.study.task import Task, open_task
from plait.training.recipe import Recipe

DEFAULT_RANGE = (1e-4, 1e-1)
"""Three decades: the best rates of published methods lie in them, at ranks of 1 to 256."""

Say = Callable[["Event"], None]


@dataclass(frozen=True)
class Event:
    """Something to show while a bake-off goes on."""

    text: str
    done: int
    """Trials finished, and how many are planned (0 before there is a plan)."""
    total: int
    left: float
    """Seconds of the budget; infinity without one."""


@dataclass(frozen=True)
class Rules:
    """How a bake-off is held; the fields of `settings` must not change when it is resumed.

    Attributes:
        budget: seconds of wall time for all of it, infinity for as long as it takes.
        parameters: "auto" (the count of the recipe's method and options), a number, or None:
            every method as it is by default.
        lr: the range of learning rates, the same for all.
        steps, trials, seeds: of a training run; learning rates and seeds each; None: planned.
        finalists: how many methods go into the finals; None: all.
        grid: try an even grid to the end instead of Optuna with successive halving.
        equal: whether trials are of equal "steps" or equal "time".
        processes: trials at once on this machine.
        ray: run trials on a Ray cluster, `processes` at once (None: as many as it has cores).
    """

    budget: float
    parameters: int | str | None = "auto"
    lr: Range = DEFAULT_RANGE
    steps: int | None = None
    trials: int | None = None
    seeds: int | None = None
    finalists: int | None = None
    grid: bool = False
    equal: Equal = "steps"
    processes: int = 1
    ray: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "trials", "seeds", "finalists", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlaitError(f"compare: {name} is {value}; at least 1.")
        low, high = self.lr
        if not 0 < low < high:
            raise PlaitError(f"compare: learning rates from {low} to {high} are no range.")
        if self.equal not in ("steps", "time"):
            raise PlaitError(f"compare: equal is {self.equal!r}; use 'steps' or 'time'.")
        wrong = isinstance(self.parameters, str) and self.parameters != "auto"
        if wrong or (isinstance(self.parameters, int) and self.parameters < 1):
            raise PlaitError("compare: parameters are 'auto', a number, or None for no matching.")

    def settings(self) -> dict[str, Any]:
        """What decides outcomes, unlike the time and the place."""
        free = ("budget", "processes", "ray", "seeds")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in free}


def compare(
    subject: Recipe | Task | str | os.PathLike[str],
    methods: str | Sequence[str | Contender],
    *,
    budget: str | float | None = None,
    output: str | os.PathLike[str] | None = None,
    parameters: int | str | None = "auto",
    lr: Range = DEFAULT_RANGE,
    steps: int | None = None,
    trials: int | None = None,
    seeds: int | None = None,
    finalists: int | None = None,
    grid: bool = False,
    equal: Equal = "steps",
    processes: int = 1,
    ray: bool = False,
    restart: bool = False,
    progress: Say = lambda event: None,
) -> Comparison:
    """Hold a bake-off of `methods` and write report.html and comparison.json.

    Args:
        subject: a recipe or its YAML file, a `Task`, or "module:object" naming one.
        methods: names as in `plait methods`, joined by commas or in a list; see
            `plait.study.contender` for `lora:rank=4`, `pissa+lora-plus` and the like.
        budget: wall time, "30m" or seconds; None: no limit.
        output: the folder; None is the recipe's output with "-compare" behind it. What is finished
            there is not run again: the same call goes on after an interruption, with what is
            left of the budget.
        restart: remove what the folder holds.
        progress: called with an `Event` after each trial.

    The others are described at `Rules`. Raises PlaitError for unknown methods, for a budget too
    short for a single fair round, for a missing extra, and for a folder that holds another
    bake-off.
    """
    from plait.study.bakeoff import BakeOff

    rules = Rules(
        parse_budget(budget),
        parameters,
        lr,
        steps,
        trials,
        seeds,
        finalists,
        grid,
        equal,
        processes,
        ray,
    )
    task = make_task(subject)
    contenders = parse_contenders(methods, task.recipe)
    if not grid:
        import_optuna()  # a missing extra shows before anything is loaded
    folder = Path(output) if output is not None else Path(f"{task.recipe.output}-compare")
    place = make_place(task, rules)
    try:
        return BakeOff(task, contenders, rules, folder, place, restart, progress).hold()
    finally:
        place.close()


def make_task(subject: Recipe | Task | str | os.PathLike[str], **options: Any) -> Task:
    """A task from whatever `compare` takes; `options` are `RecipeTask`'s."""
    if isinstance(subject, Recipe):
        return RecipeTask(subject, **options)
    if isinstance(subject, str) and ":" in subject and not Path(subject).is_file():
        return open_task(subject)
    if isinstance(subject, str | os.PathLike):
        return RecipeTask(Recipe.load(subject), **options)
    return subject


def make_place(task: Task, rules: Rules) -> Place:
    """Where the trials run."""
    if rules.ray:
        return OnRay(task, rules.processes if rules.processes > 1 else None)
    return Processes(task, rules.processes) if rules.processes > 1 else Here(task)
