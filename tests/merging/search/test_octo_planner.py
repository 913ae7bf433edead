"""The sweep finds a planted common weight, and tuning weights that differ."""

from __future__ import annotations

import pytest
from tasks import network, planted, squared

from plait.errors import PlaitError
from plait.merging.search import search, supervised

NAMES = ["one", "two"]


def test_the_planted_common_weight_is_found() -> None:
    net = network()
    loss = supervised(planted(net, {"one": 0.75, "two": 0.75})[:1], squared)
    lambdas = [0.25, 0.5, 0.75, 1.0]
    found = search(net, NAMES, "octo-planner", objective=loss, lambdas=lambdas)
    assert found.coefficients.flatten().tolist() == [0.75, 0.75]
    assert found.value < 1e-12 and len(found.history) == 4
    first = search(net, NAMES, "octo-planner", objective=loss)
    assert first.history[0]["point"] == [[0.5], [0.5]] and len(first.history) == 8


def test_tuning_goes_on_from_the_sweep_and_resumes_in_one_file(tmp_path) -> None:
    net = network()
    loss = supervised(planted(net, {"one": 0.8, "two": 0.6})[:1], squared)
    swept = search(net, NAMES, "octo-planner", objective=loss)
    tuned = search(net, NAMES, "octo-planner", objective=loss, budget=48, log=tmp_path / "log")
    assert len(tuned.history) == 48
    assert tuned.value < 0.05 * swept.value
    assert tuned.coefficients.flatten().tolist() == pytest.approx([0.8, 0.6], abs=0.03)

    def refuse(model, step):
        raise AssertionError("everything is known already")

    again = search(net, NAMES, "octo-planner", objective=refuse, budget=48, log=tmp_path / "log")
    assert again.coefficients.tolist() == tuned.coefficients.tolist()
    with pytest.raises(PlaitError, match="for 8 lambdas alone"):
        search(net, NAMES, "octo-planner", objective=loss, budget=5)
    with pytest.raises(PlaitError, match="at least one lambda"):
        search(net, NAMES, "octo-planner", objective=loss, lambdas=[])
