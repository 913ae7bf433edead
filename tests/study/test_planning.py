"""The budget: every plan fits what it was made for, and is as much as fits."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_tasks import OneMustWin

from plait.errors import PlaitError
from plait.study import compare
from plait.study.planning import (
    MARGIN,
    REPORT_SECONDS,
    Costs,
    Wanted,
    make_plan,
    makespan,
    parse_budget,
    read_plan,
    share_steps,
)

SECONDS = st.floats(0.01, 5.0)


def costs(steps: list[float], start: float = 0.5) -> Costs:
    names = "abcdef"[: len(steps)]
    return Costs(dict.fromkeys(names, start), dict(zip(names, steps, strict=True)), 1.0, 2.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(SECONDS, min_size=1, max_size=6), st.floats(60, 5000), st.integers(1, 3))
def test_a_plan_fits_its_budget(steps: list[float], budget: float, workers: int) -> None:
    wanted = Wanted(steps=200, workers=workers)
    try:
        plan = make_plan(costs(steps), wanted, budget)
    except PlaitError:
        return
    assert plan.tune_seconds + plan.final_seconds <= (budget - REPORT_SECONDS) * MARGIN
    assert min(plan.steps.values()) >= 4 and max(plan.steps.values()) <= 200
    assert len(set(plan.steps.values())) == 1
    assert make_plan(costs(steps), wanted, budget * 3).seeds >= plan.seeds


def test_a_budget_too_short_names_one_that_would_do() -> None:
    one, wanted = costs([1.0, 2.0]), Wanted(steps=100)
    with pytest.raises(PlaitError, match="about") as caught:
        make_plan(one, wanted, 30)
    needed = float(str(caught.value).partition("about ")[2].partition(" s")[0])
    assert min(make_plan(one, wanted, needed + 1).steps.values()) >= 4


def test_equal_time_gives_the_slower_fewer_steps() -> None:
    steps = share_steps(costs([0.1, 0.2, 0.4]), 100, "time")
    assert steps == {"a": 200, "b": 100, "c": 50}


def test_what_the_user_fixed_stays_fixed() -> None:
    plan = make_plan(costs([0.1, 0.1]), Wanted(steps=50, trials=8, seeds=2, finalists=1), 4000)
    assert (plan.trials, plan.seeds, plan.finalists) == (8, 2, 1)
    assert plan.steps == {"a": 50, "b": 50}


def test_a_plan_survives_json() -> None:
    import json

    plan = make_plan(costs([0.1, 0.3]), Wanted(steps=50), 900)
    again = read_plan(json.loads(json.dumps(plan.as_dict())))
    assert again == plan and again.costs == plan.costs


def test_makespan_is_the_best_schedule_of_even_jobs() -> None:
    assert makespan([1.0] * 6, 2) == 3 and makespan([5.0, 1.0, 1.0], 2) == 5
    assert makespan([1.0, 2.0, 3.0], 1) == 6


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("90s", 90), ("1h30m", 5400), ("45", 45), (None, math.inf)]
)
def test_budgets_are_read(text: str | None, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["soon", "0m", "m", "-3m"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(PlaitError, match="budget"):
        parse_budget(text)


class Clock:
    """Time that passes only when work is done."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Slow(OneMustWin):
    """A step takes a second, a validation and a scoring as long as they say; later ones drag."""

    recipe = OneMustWin.recipe.replace(steps=10)
    clock: Any = None
    drag = 1.0
    done = 0

    def loss(self, model: Any, batch: Any) -> Any:
        type(self).done += 1
        self.clock.now += 1.0 if self.done < 20 else self.drag
        return super().loss(model, batch)

    def validate(self, model: nn.Module) -> float:
        self.clock.now += 2.0
        return super().validate(model)

    def scores(self, model: nn.Module) -> Iterator[float]:
        for value in super().scores(model):
            self.clock.now += 0.1
            yield value


@pytest.mark.parametrize("drag", [0.5, 1.0, 1.6])
@pytest.mark.parametrize("budget", [200, 500])
def test_all_of_it_ends_within_the_budget(
    budget: int, drag: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the machine slows down after it was probed, by two thirds."""
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(Slow, "clock", clock)
    monkeypatch.setattr(Slow, "drag", drag)
    monkeypatch.setattr(Slow, "done", 0)
    found = compare(Slow(), "lora,ia3", budget=budget, output=tmp_path, grid=True)
    spent = clock.now - 1000.0
    assert spent <= 1.1 * budget
    assert found.spent["seconds"] == pytest.approx(spent, abs=1)
    assert found.verdict is not None and found.spent["seeds"] >= 1
    assert len({len(row.seeds) for row in found.rows}) == 1  # nobody has a seed more
    assert len({len(row.rates) for row in found.rows}) == 1


def test_a_test_set_too_slow_to_score_is_cut_for_all_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(Slow, "clock", clock)

    class Slower(Slow):
        def scores(self, model: nn.Module) -> Iterator[float]:
            for value in OneMustWin.scores(self, model):
                clock.now += 2.0
                yield value

    monkeypatch.setattr(Slower, "drag", 1.0)
    found = compare(Slower(), "lora,ia3", budget=600, output=tmp_path, grid=True)
    assert 8 <= found.task["test_examples"] < 60 and found.verdict is not None
    with pytest.raises(PlaitError, match="test examples"):
        compare(Slower(), "lora,ia3", budget=100, output=tmp_path / "short", grid=True)
