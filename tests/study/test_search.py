"""Learning rates that are tried, and when a trial is given up."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from plait.errors import PlaitError
from plait.study.halving import goes_on, rungs
from plait.study.search import LogGrid, OptunaSearch, spaced


def test_rates_are_even_in_the_logarithm_and_begin_in_the_middle() -> None:
    found = spaced((1e-4, 1e0), 4)
    assert sorted(found) == pytest.approx([10**-3.5, 10**-2.5, 10**-1.5, 10**-0.5], rel=0.01)
    assert {found[0], found[1]} == {0.00316, 0.0316}
    assert spaced((1e-4, 1e-2), 1) == [1e-3]


def test_the_grid_gives_each_rate_once() -> None:
    grid = LogGrid((1e-4, 1e-1), 3)
    expected = [10**-3.5, 10**-2.5, 10**-1.5]
    assert sorted(grid.ask() for _ in range(3)) == pytest.approx(expected, rel=0.01)


def loss(rate: float) -> float:
    return (math.log10(rate) + 2.3) ** 2


def play(search: OptunaSearch, count: int) -> list[float]:
    rates = []
    for _ in range(count):
        rates.append(search.ask())
        search.tell(rates[-1], loss(rates[-1]), {})
    return rates


def test_optuna_closes_in_on_the_best_rate_and_replays_exactly() -> None:
    pytest.importorskip("optuna")
    rates = play(OptunaSearch((1e-4, 1e-1), 12), 12)
    assert set(rates[:8]) == set(spaced((1e-4, 1e-1), 8))
    later = np.mean([loss(r) for r in rates[8:]])
    assert later < np.mean([loss(r) for r in rates[:8]])
    assert rates == play(OptunaSearch((1e-4, 1e-1), 12), 12)


def test_pruned_trials_are_told_too() -> None:
    pytest.importorskip("optuna")
    search = OptunaSearch((1e-4, 1e-1), 3)
    for _ in range(3):
        rate = search.ask()
        search.tell(rate, None, {5: 1.0, 10: math.nan})
    assert len(search.study.trials) == 3 and not search.asked


def test_without_optuna_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(PlaitError, match=r"plait\[compare\].*--grid"):
        OptunaSearch((1e-4, 1e-1), 3)


def test_halving_agrees_with_optunas_pruner() -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    draw = np.random.default_rng(0)
    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=1, reduction_factor=2, min_early_stopping_rate=0
    )
    study = optuna.create_study(pruner=pruner)
    seen: list[float] = []
    for _ in range(30):
        trial, value = study.ask(), float(draw.normal())
        trial.report(value, 1)
        assert goes_on(value, seen, eta=2) == (not trial.should_prune())
        seen.append(value)
        study.tell(trial, value)


def test_what_is_no_number_never_goes_on() -> None:
    assert not goes_on(math.nan, []) and not goes_on(math.inf, [])
    assert goes_on(1.0, [])


def test_rungs_lie_inside_the_run() -> None:
    assert rungs(100) == [25, 50]
    assert all(0 < r < s for s in range(1, 12) for r in rungs(s))
