"""MAP in its three forms on a model with planted tasks."""

from __future__ import annotations

import math

import pytest
import torch
from tasks import network, planted, squared
from torch import Tensor

from plait.errors import PlaitError
from plait.merging.search import Coefficients, evaluate, search
from plait.merging.search.methods._nested import Node, closest
from plait.merging.search.pareto import nondominated
from plait.merging.search.sampling import angles, from_angles, where_wrong

NAMES = ["one", "two"]


class Tasks:
    """Tasks that want planted weights; counts how often each was measured."""

    def __init__(self, net, wanted: dict[str, dict[str, float]]) -> None:
        self.batches = {task: planted(net, weights)[0] for task, weights in wanted.items()}
        self.count = dict.fromkeys(wanted, 0)

    def metric(self, task: str):
        def measure(model) -> float:
            self.count[task] += 1
            return -float(squared(model, self.batches[task]))

        return measure

    @property
    def metrics(self):
        return {task: self.metric(task) for task in self.batches}


def two(net) -> Tasks:
    return Tasks(net, {"a": {"one": 0.9, "two": 0.2}, "b": {"one": 0.2, "two": 0.8}})


@pytest.mark.parametrize("form", ["plain", "bayesian"])
def test_it_asks_the_model_as_often_as_it_says_and_finds_both_ends(form: str, tmp_path) -> None:
    net = network(size=0.2)
    tasks = two(net)
    log = tmp_path / "log"
    found = search(net, NAMES, "map", metrics=tasks.metrics, form=form, size=30, log=log)
    assert tasks.count == {"a": 12, "b": 12} and len(found.history) == 12
    front = found.front
    assert all(s.r2 > 0.98 and s.held_out_r2 > 0.9 for s in front.surrogates)
    assert front.points.min() >= 0 and front.points.max() <= 1
    assert bool(nondominated(front.metrics).all())
    for i, wanted in enumerate([[0.9, 0.2], [0.2, 0.8]]):
        chosen = front.choose([1.0 - i, float(i)])
        assert chosen.coefficients.flatten().tolist() == pytest.approx(wanted, abs=0.12)
        space, batch = Coefficients(net, NAMES), list(tasks.batches.values())[i]
        loss = evaluate(space, lambda m, s, b=batch: squared(m, b), chosen.coefficients)
        middle = evaluate(space, lambda m, s, b=batch: squared(m, b), torch.full((2, 1), 0.5))
        assert loss < 0.3 * middle
    again = search(net, NAMES, "map", metrics=tasks.metrics, form=form, size=30, log=log)
    assert tasks.count["a"] == 12 and torch.equal(again.front.points, front.points)
    with pytest.raises(PlaitError, match="at least 6 evaluations"):
        search(net, NAMES, "map", metrics=tasks.metrics, form=form, budget=5)


def test_a_larger_budget_goes_on_from_the_smaller_ones_points(tmp_path) -> None:
    net = network(size=0.2)
    tasks = two(net)
    search(net, NAMES, "map", metrics=tasks.metrics, budget=8, log=tmp_path / "log")
    search(net, NAMES, "map", metrics=tasks.metrics, budget=14, log=tmp_path / "log")
    assert tasks.count["a"] == 14


def test_preferences_choose_along_the_front() -> None:
    net = network(size=0.2)
    tasks = two(net)
    firsts = [
        search(net, NAMES, "map", metrics=tasks.metrics, preference=p).coefficients[0].item()
        for p in ([1, 0], [1, 1], [0, 1])
    ]
    assert firsts[0] > firsts[1] > firsts[2]
    with pytest.raises(PlaitError, match="preference is 2 weights"):
        search(net, NAMES, "map", metrics=tasks.metrics, preference=[1])


def test_one_adapter_and_one_task_give_the_best_point() -> None:
    net = network(size=0.2)
    tasks = Tasks(net, {"a": {"one": 0.6}})
    found = search(net, ["one"], "map", metrics=tasks.metrics)
    assert found.coefficients.item() == pytest.approx(0.6, abs=0.05)
    assert len(found.front.points) == 1


# -- where Bayesian MAP looks --------------------------------------------------------------------


def test_angles_are_the_polar_ones_and_come_back() -> None:
    g = torch.Generator().manual_seed(0)
    u = torch.rand(30, 2, generator=g, dtype=torch.float64)
    expected = [math.atan2(y, x) for x, y in u.tolist()]
    assert angles(u)[:, 0].tolist() == pytest.approx(expected)
    u = torch.rand(30, 4, generator=g, dtype=torch.float64)
    torch.testing.assert_close(from_angles(angles(u), u.norm(dim=1)), u)
    assert angles(u).min() >= 0 and angles(u).max() <= math.pi / 2


def test_new_points_go_where_the_errors_are_and_stay_in_the_box() -> None:
    g = torch.Generator().manual_seed(0)
    box = (-0.5, 1.5)
    points = box[0] + 2 * torch.rand(200, 2, generator=g, dtype=torch.float64)
    turned = torch.tensor([math.atan2(y + 0.5, x + 0.5) for x, y in points.tolist()])
    low, high = turned < math.pi / 8, turned > 3 * math.pi / 8
    errors = torch.stack([low.double(), high.double()], 1) + 0.01
    found = where_wrong(points, errors, 60, box, g, bins=4)
    assert found.min() >= box[0] and found.max() <= box[1]
    there = torch.tensor([math.atan2(y + 0.5, x + 0.5) for x, y in found.tolist()])
    assert bool((there[0::2] < math.pi / 8).all()) and bool((there[1::2] > 3 * math.pi / 8).all())
    radius = (found - box[0]).norm(dim=1) / 2
    assert radius.min() >= 0.2 and radius.max() <= 0.8
    even = where_wrong(points, torch.zeros(200, 1).double(), 200, box, g, bins=2)
    share = sum(math.atan2(y + 0.5, x + 0.5) < math.pi / 4 for x, y in even.tolist()) / 200
    assert 0.35 < share < 0.65


# -- nested --------------------------------------------------------------------------------------


FOUR = ["one", "two", "three", "four"]


def test_nested_costs_k_minus_one_fronts_and_measures_pairs_at_their_own_tasks(tmp_path) -> None:
    net = network(tuple(FOUR), size=0.2)
    tasks = Tasks(net, {name: {name: 0.9} for name in FOUR})
    log = tmp_path / "log"
    found = search(net, FOUR, "map", metrics=tasks.metrics, form="nested", log=log)
    assert len(found.history) == 4 + 3 * 12
    # Each task: alone, in its first pair, and in the pair of pairs.
    assert set(tasks.count.values()) == {1 + 12 + 12}
    names = [set("+".join(fact["pair"]).split("+")) for fact in found.facts["pairs"]]
    assert [len(n) for n in names] == [2, 2, 4] and names[0] | names[1] == set(FOUR)
    assert found.front.metrics.shape[1] == 2
    again = search(net, FOUR, "map", metrics=tasks.metrics, form="nested", log=log)
    assert set(tasks.count.values()) == {25}
    assert torch.equal(again.coefficients, found.coefficients)


def test_nested_of_two_is_the_plain_front_of_two_tasks() -> None:
    net = network(size=0.2)
    tasks = Tasks(net, {"one": {"one": 0.9, "two": 0.1}, "two": {"two": 0.7}})
    plain = search(net, NAMES, "map", metrics=tasks.metrics)
    nested = search(net, NAMES, "map", metrics=tasks.metrics, form="nested")
    torch.testing.assert_close(nested.front.points, plain.front.points)
    torch.testing.assert_close(nested.coefficients, plain.coefficients)


def test_nested_is_near_the_best_compromise_of_a_dense_search() -> None:
    net = network(tuple(FOUR), size=0.15)
    tasks = Tasks(net, {name: {name: 0.9} for name in FOUR})

    def mean(c: Tensor) -> float:
        space = Coefficients(net, FOUR)
        losses = [
            evaluate(space, lambda m, s, b=b: squared(m, b), c) for b in tasks.batches.values()
        ]
        return sum(losses) / 4

    g = torch.Generator().manual_seed(0)
    draws = [mean(torch.rand(4, 1, generator=g, dtype=torch.float64)) for _ in range(300)]
    nested = search(net, FOUR, "map", metrics=tasks.metrics, form="nested")
    assert mean(nested.coefficients) < sorted(draws)[30], "among the best tenth of 300, for 40"


def test_closest_pairs_first_and_one_is_left_over() -> None:
    nodes = [Node(torch.zeros(1), (str(v),), v) for v in (0.9, 0.1, 0.52, 0.12, 0.5)]
    pairs, rest = closest(nodes)
    assert [{p.value for p in pair} for pair in pairs] == [{0.1, 0.12}, {0.5, 0.52}]
    assert [n.value for n in rest] == [0.9]


def test_nested_wants_a_task_for_each_adapter() -> None:
    net = network()
    tasks = Tasks(net, {"a": {"one": 0.9}})
    with pytest.raises(PlaitError, match="1 tasks and 2 adapters"):
        search(net, NAMES, "map", metrics=tasks.metrics, form="nested")
