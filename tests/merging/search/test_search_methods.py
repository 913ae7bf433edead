"""Search methods on planted coefficients, and the invariants of their papers."""

from __future__ import annotations

import pytest
import torch
from tasks import inputs, network, planted, squared
from torch import nn

import plait
from plait.errors import PlaitError
from plait.merging.search import (
    WANTS,
    Coefficients,
    evaluate,
    frank_wolfe,
    get_search_method,
    make_search,
    search,
    search_method_names,
    supervised,
)
from plait.merging.search.methods.expert_merging import by_importance, importance

NAMES = ["one", "two"]


@pytest.mark.parametrize("name", search_method_names())
def test_every_file_ends_in_its_record(name: str) -> None:
    method = get_search_method(name)
    assert method.name == name and method.paper
    assert make_search(method, {}).wants in WANTS


def test_adamerging_starts_at_task_arithmetic_and_grows_sure() -> None:
    net = network()
    tasks = {"a": [{"x": inputs(1)}], "b": [{"x": inputs(2)}]}
    found = search(net, NAMES, "adamerging", tasks, steps=8, lr=0.05)
    assert found.history[0]["point"] == [[0.3] * 3] * 2
    assert found.value < found.history[0]["value"] - 0.01
    tied = search(net, NAMES, "adamerging", tasks, steps=1, grouping="adapter", clamp=True)
    layers = torch.tensor(found.history[0]["gradient"]).sum(1)
    torch.testing.assert_close(torch.tensor(tied.history[0]["gradient"])[:, 0], layers)


@pytest.mark.parametrize("optimizer", ["nelder-mead", "gradient", "random"])
def test_lorahub_lowers_the_few_shot_loss_within_its_evaluations(optimizer: str) -> None:
    net = network(("one", "two", "three"))
    data = planted(net, {"one": 0.7, "two": 0.25})[:1]
    names = ["one", "two", "three"]
    options = {"optimizer": optimizer, "evaluations": 30, "l1": 0.01}
    found = search(net, names, "lorahub", data, loss=squared, **options)
    assert found.history[0]["point"] == [[0.0]] * 3 and len(found.history) == 30
    assert found.value == min(e["value"] for e in found.history) < found.history[0]["value"]
    loss = evaluate(found.space, supervised(data, squared), found.coefficients)
    assert found.value == pytest.approx(loss + 0.01 * float(found.coefficients.abs().mean()))
    assert float(found.coefficients.abs().max()) <= 1.5


def test_lora_soups_learn_weights_that_add_up_to_one() -> None:
    net = network()
    data = planted(net, {"one": 0.8, "two": 0.2})
    options = {"lr": 0.1, "steps": 40, "grouping": "adapter"}
    found = search(net, NAMES, "lora-soups", data, loss=squared, **options)
    assert found.history[0]["point"][0] == found.history[0]["point"][1]
    torch.testing.assert_close(found.coefficients.sum(0), torch.ones(1, dtype=torch.float64))
    assert found.coefficients.flatten().tolist() == pytest.approx([0.8, 0.2], abs=0.05)
    once = search(net, NAMES, "lora-soups", data, loss=squared)
    assert len(once.history) == len(data) + 1


# -- Frank-Wolfe --------------------------------------------------------------------------------


class Straight(nn.Module):
    """One linear: a squared loss is then a convex quadratic of the coefficients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)


def convex(names: tuple[str, ...], wanted: dict[str, float]):
    torch.manual_seed(0)
    net = Straight().double()
    for i, name in enumerate(names):
        adapter = plait.attach(net, "lora", name=name, rank=2, targets="all-linear", seed=i)
        draw = torch.Generator().manual_seed(i)
        for p in adapter.parameters():
            p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64)
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    plait.activate(net, wanted)
    target = net.layer(x).detach()
    return net, lambda model, step: (model.layer(x) - target).square().mean()


def test_frank_wolfe_nears_the_optimum_and_its_gap_bounds_the_error() -> None:
    net, loss = convex(("a", "b", "c"), {"a": 0.6, "b": 0.3})
    space = Coefficients(net, ["a", "b", "c"], start=0.0)
    found = frank_wolfe(space, loss, steps=60)
    first, last = found.history[1]["value"], found.value
    assert last < 0.02 * first
    for entry in found.history:
        point = torch.tensor(entry["point"], dtype=torch.float64)
        assert point.min() >= 0 and point.sum() <= 1 + 1e-9
        assert entry["gap"] >= entry["value"] - 1e-9, "the least value is 0"


def test_the_first_step_jumps_to_the_picked_adapter() -> None:
    net, loss = convex(("a", "b"), {"b": 1.0})
    found = search(net, ["a", "b"], "fw-merging", objective=loss, steps=1)
    assert found.coefficients.flatten().tolist() == [0.0, 1.0] and found.value < 1e-20
    assert found.history[0]["picked"] == ["b"]


def test_a_copy_in_the_pool_or_an_empty_adapter_in_the_pool_changes_nothing() -> None:
    wanted = {"a": 0.6, "b": 0.4}
    net, loss = convex(("a", "b"), wanted)
    alone = search(net, ["a", "b"], "fw-merging", objective=loss, steps=12)
    twin = plait.attach(net, "lora", name="copy", rank=2, targets="all-linear")
    twin.load_state_dict(plait.adapters(net)["a"].state_dict())
    zero = plait.attach(net, "lora", name="zero", rank=2, targets="all-linear")
    for p in (*twin.parameters(), *zero.parameters()):
        p.data = p.data.double()
    more = search(net, ["a", "b", "copy", "zero"], "fw-merging", objective=loss, steps=12)
    torch.testing.assert_close(more.coefficients[:2], alone.coefficients)
    assert not more.coefficients[2:].any()


def test_groups_pick_for_themselves() -> None:
    net = network()
    sites = list(plait.adapters(net)["one"].deltas)
    loss = supervised(planted(net, {"one": {p: float("0" in p) for p in sites}})[:1], squared)
    options = {"grouping": "layer", "oracle": "group", "steps": 6}
    found = search(net, NAMES, "fw-merging", objective=loss, **options)
    assert all(len(e["picked"]) == 3 for e in found.history)
    assert found.value < found.history[0]["value"]
    with pytest.raises(PlaitError, match="step_size"):
        search(net, NAMES, "fw-merging", objective=loss, step_size=2.0)


# -- imitation ----------------------------------------------------------------------------------


def test_a_single_expert_is_imitated_down_to_its_own_entropy() -> None:
    net = network()
    data = {"one": [{"x": inputs(3)}]}
    found = search(
        net,
        ["one"],
        "expert-merging",
        data,
        grouping="adapter",
        form="free",
        beta=0.0,
        lr=0.1,
        steps=60,
        hidden=["layers.0.up"],
    )
    plait.activate(net, "one")
    p = net(inputs(3)).logits.softmax(-1)
    own = float(-(p * p.log()).sum(-1).mean().detach())
    assert found.coefficients.item() == pytest.approx(1.0, abs=0.02)
    assert found.value == pytest.approx(own, abs=1e-3)
    assert found.history[0]["value"] > own + 0.01


def test_two_experts_are_met_halfway_and_the_penalty_holds_back() -> None:
    net = network()
    data = {"one": [{"x": inputs(3)}], "two": [{"x": inputs(4)}]}
    found = search(net, NAMES, "expert-merging", data, steps=15)
    assert found.space.shape == (2, 5)
    assert found.value < found.history[0]["value"]
    assert float(found.coefficients.min()) > 0 and float(found.coefficients.max()) < 1
    held = search(net, NAMES, "expert-merging", data, steps=15, beta=100.0)
    assert (held.coefficients - 0.1).abs().max() < (found.coefficients - 0.1).abs().max()


def test_importance_is_the_papers_three_factors_on_dense_matrices() -> None:
    net = network()
    data = {"one": [{"x": inputs(3)}], "two": [{"x": inputs(4)}]}
    first = search(net, NAMES, "expert-merging", data, steps=2)
    weights, expected = first.weights(), {}
    for path in first.space.parts:
        for i, adapter in enumerate(first.space.adapters):
            dense = adapter.deltas[path].dense().detach()
            size = weights[i][path] * float(dense.square().mean().sqrt())
            expected[path] = expected.get(path, 0.0) + size / 2
    most = max(expected.values())
    found = importance(first)
    assert found == pytest.approx({path: e / most for path, e in expected.items()}, rel=1e-5)
    pieces = by_importance(found, 4)
    assert max(pieces.values()) == 4 and min(pieces.values()) >= 1
    assert by_importance({"a": 1.0, "b": 0.1, "c": 0.6}, 4, 0) == {"a": 4, "b": 0, "c": 2}
