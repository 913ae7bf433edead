"""The sweep finds a planted common weight, and tuning weights that differ."""

from __future__ import annotations

import pytest
from tasks import network, planted, squared

from plait.errors import PlaitError
from plait.merging.search import supervised
from plait.merging.search.methods.octo_planner import octo_planner

NAMES = ["one", "two"]


def test_the_planted_common_weight_is_found(tmp_path) -> None:
    net = network()
    loss = supervised(planted(net, {"one": 0.75, "two": 0.75})[:1], squared)
    found = octo_planner(net, NAMES, loss, lambdas=[0.25, 0.5, 0.75, 1.0], log=tmp_path / "log")
    assert found.coefficients.flatten().tolist() == [0.75, 0.75]
    assert found.value < 1e-12 and len(found.history) == 4
    first = octo_planner(net, NAMES, loss)
    assert first.history[0]["point"] == [[0.5], [0.5]] and len(first.history) == 8


def test_tuning_goes_on_from_the_sweep() -> None:
    net = network()
    loss = supervised(planted(net, {"one": 0.8, "two": 0.6})[:1], squared)
    swept = octo_planner(net, NAMES, loss)
    tuned = octo_planner(net, NAMES, loss, tune=40)
    assert tuned.value < 0.05 * swept.value
    assert tuned.coefficients.flatten().tolist() == pytest.approx([0.8, 0.6], abs=0.03)
    with pytest.raises(PlaitError, match="at least one lambda"):
        octo_planner(net, NAMES, loss, lambdas=[])
