"""How to spend a budget of wall time: how many steps, learning rates and seeds, for all alike.

    probe (measured) ──► tuning: rates x methods ──► finals: seeds x finalists ──► report

The costs of a step, a start, a validation and a scoring were measured for every method; a plan is
the best row of `LADDER` whose estimate fits, with the wanted number of steps if it can be had.
What pruning saves is not counted on: it becomes further seeds in the finals.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from plait.errors import PlaitError
from plait.study.halving import rungs

LADDER = ((9, 5), (7, 5), (7, 4), (6, 4), (6, 3), (5, 3), (4, 3), (3, 3))
"""(learning rates, seeds), from what a long budget affords down to the least that says anything:
with two seeds Student's t is 13, and hardly any difference stands out."""
SHARES = (1.0, 1.0, 1.0, 1.0, 1.0, 0.7, 0.4, 0.0)
"""Share of the wanted steps at which each is better than the next with more of them."""
LEAST_STEPS = 4
MARGIN = 0.92
"""Of the budget that is planned with; the rest is for a machine that is slower than when probed."""
REPORT_SECONDS = 4.0

Equal = Literal["steps", "time"]


@dataclass(frozen=True)
class Costs:
    """Seconds, as measured."""

    start: dict[str, float]
    """Of attaching and initialising, by contender."""
    step: dict[str, float]
    validate: float
    score: float


@dataclass(frozen=True)
class Wanted:
    """What the user fixed (None: the plan decides)."""

    steps: int
    trials: int | None = None
    seeds: int | None = None
    finalists: int | None = None
    equal: Equal = "steps"
    workers: int = 1
    prunes: bool = True


@dataclass(frozen=True)
class Plan:
    """What will be run. `steps` by contender: all alike, unless equal time was asked for."""

    steps: dict[str, int]
    trials: int
    seeds: int
    finalists: int
    tune_seconds: float
    """Estimated, without pruning."""
    final_seconds: float
    note: str = ""
    costs: Costs | None = field(default=None, compare=False)

    def as_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def makespan(costs: Iterable[float], workers: int) -> float:
    """Seconds that these jobs take on so many workers, the longest first."""
    ends = [0.0] * workers
    for cost in sorted(costs, reverse=True):
        ends[ends.index(min(ends))] += cost
    return max(ends)


def make_plan(costs: Costs, wanted: Wanted, seconds: float) -> Plan:
    """The plan for `seconds` of wall time (infinity: all that is wanted).

    Raises PlaitError where not even the shortest plan fits, naming a budget that would do.
    """
    rows = [(wanted.trials or t, wanted.seeds or s) for t, s in LADDER]
    if math.isinf(seconds):
        return _plan(costs, wanted, wanted.steps, (wanted.trials or 6, wanted.seeds or 3))
    usable = max(0.0, seconds - REPORT_SECONDS) * MARGIN
    for row, share in zip(rows, SHARES, strict=True):
        most = _most_steps(costs, wanted, row, usable)
        if most >= min(wanted.steps, max(LEAST_STEPS, math.ceil(share * wanted.steps))):
            return _plan(costs, wanted, most, row)
    least = _plan(costs, wanted, min(LEAST_STEPS, wanted.steps), rows[-1])
    needed = (least.tune_seconds + least.final_seconds) / MARGIN + REPORT_SECONDS
    raise PlaitError(
        f"compare: {seconds:.0f} s are left, and the shortest bake-off of {len(costs.step)} "
        f"methods would take about {needed:.0f} s; give a longer budget, fewer methods or fewer "
        "test rows."
    )


def _most_steps(costs: Costs, wanted: Wanted, row: tuple[int, int], usable: float) -> int:
    """The most steps, up to the wanted ones, whose estimate fits; 0 where none does."""
    low, high = 0, wanted.steps
    while low < high:
        middle = (low + high + 1) // 2
        plan = _plan(costs, wanted, middle, row)
        if plan.tune_seconds + plan.final_seconds <= usable:
            low = middle
        else:
            high = middle - 1
    return low


def _plan(costs: Costs, wanted: Wanted, count: int, row: tuple[int, int]) -> Plan:
    trials, seeds = row
    steps = share_steps(costs, count, wanted.equal)
    tune = trials * tune_round(costs, steps, wanted)
    finalists = min(len(steps), wanted.finalists or len(steps))
    # Which ones will be finalists is not known: suppose the dearest.
    dearest = sorted(steps, key=lambda n: -final_cost(costs, steps, n))[:finalists]
    final = seeds * makespan((final_cost(costs, steps, n) for n in dearest), wanted.workers)
    note = "" if count >= wanted.steps else f"{wanted.steps} steps were wanted"
    return Plan(steps, trials, seeds, finalists, tune, final, note, costs)


def share_steps(costs: Costs, count: int, equal: Equal) -> dict[str, int]:
    """Steps by contender: `count` for all, or as many as take what `count` of the median take."""
    if equal == "steps":
        return dict.fromkeys(costs.step, count)
    times = sorted(costs.step.values())
    middle = times[len(times) // 2]
    return {n: max(1, round(count * middle / t)) for n, t in costs.step.items()}


def tune_round(costs: Costs, steps: Mapping[str, int], wanted: Wanted) -> float:
    """Seconds of one learning rate for every method."""

    def cost(name: str) -> float:
        looks = 1 + (len(rungs(steps[name])) if wanted.prunes else 0)
        return costs.start[name] + steps[name] * costs.step[name] + looks * costs.validate

    return makespan((cost(name) for name in steps), wanted.workers)


def final_cost(costs: Costs, steps: Mapping[str, int], name: str) -> float:
    """Seconds of one seed of one finalist."""
    train = costs.start[name] + steps[name] * costs.step[name]
    return train + costs.validate + costs.score


def read_plan(stored: Mapping[str, object]) -> Plan:
    """A plan from its JSON."""
    known = {f.name for f in dataclasses.fields(Plan)}
    values = {k: v for k, v in stored.items() if k in known}
    costs = values.get("costs")
    values["costs"] = Costs(**costs) if isinstance(costs, dict) else None
    return Plan(**values)  # type: ignore[arg-type]


def parse_budget(text: str | float | None) -> float:
    """Seconds from "30m", "1h30m", "90s" or a number; infinity for None."""
    if text is None:
        return math.inf
    if isinstance(text, int | float):
        return float(text)
    total, number = 0.0, ""
    for letter in text.strip().lower():
        if letter.isdigit() or letter == ".":
            number += letter
        elif letter in "smh" and number:
            total, number = total + float(number) * {"s": 1, "m": 60, "h": 3600}[letter], ""
        else:
            raise PlaitError(f"budget {text!r}: write it as 30m, 90s or 1h30m.")
    total += float(number or 0)
    if total <= 0:
        raise PlaitError(f"budget {text!r}: more than no time is wanted, as in 30m.")
    return total
