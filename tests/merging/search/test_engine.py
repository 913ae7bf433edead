"""The engine finds planted coefficients, its gradients are derivatives, its merge what it ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tasks import inputs, network, planted, squared
from torch import Tensor, nn

import plait
from plait.errors import PlaitError, UnknownNameError
from plait.merging.search import (
    Coefficients,
    descend,
    entropy,
    evaluate,
    frank_wolfe,
    minimise,
    supervised,
    value_and_gradient,
)

NAMES = ["one", "two"]
PLANTED = {"one": 0.7, "two": 0.25}


def objective(net: nn.Module):
    return supervised(planted(net, PLANTED)[:1], squared)


@pytest.mark.parametrize("grouping", ["adapter", "layer", "site"])
@pytest.mark.parametrize("form", ["free", "softmax", "sigmoid"])
def test_gradients_are_the_derivatives(grouping: str, form: str) -> None:
    net = network()
    space = Coefficients(net, NAMES, grouping=grouping, form=form, start=[0.3, 0.6])
    loss = objective(net)
    raw = space.start + 0.1 * torch.randn(space.shape, dtype=torch.float64)
    penalty = lambda c: 0.3 * c.square().sum()  # noqa: E731
    with space.searching():
        _, gradient = value_and_gradient(space, loss, raw, penalty=penalty)

    def at(z: Tensor) -> float:
        return evaluate(space, loss, space.values(z)) + float(penalty(space.values(z)))

    for i, j in [(0, 0), (1, space.shape[1] - 1)]:
        step = torch.zeros_like(raw)
        step[i, j] = 1e-5
        found = (at(raw + step) - at(raw - step)) / 2e-5
        assert float(gradient[i, j]) == pytest.approx(found, rel=1e-5, abs=1e-9)


def test_a_coefficients_gradient_is_the_inner_product_with_the_dense_one() -> None:
    net = network()
    space = Coefficients(net, NAMES, grouping="site", start=[0.3, 0.6])
    with space.searching():
        _, gradient = value_and_gradient(space, objective(net), space.start)
    merged = plait.merge(space.adapters, weights=[0.3, 0.6])
    plain, data = network(()), planted(net, PLANTED)
    for path, delta in merged.deltas.items():
        plain.get_submodule(path).weight.data += delta.dense()
    squared(plain, data[0]).backward()
    for path, part in space.parts.items():
        (j,) = part.groups
        dense = plain.get_submodule(path).weight.grad
        expected = [(dense * a.deltas[path].dense()).sum() for a in space.adapters]
        torch.testing.assert_close(gradient[:, j], torch.stack(expected).detach())


def test_tied_coefficients_gradients_are_sums() -> None:
    net = network()
    sums = []
    for grouping in ("adapter", "site"):
        space = Coefficients(net, NAMES, grouping=grouping, start=0.3)
        with space.searching():
            sums.append(value_and_gradient(space, objective(net), space.start)[1].sum(1))
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("optimizer", ["gradient", "nelder-mead", "cma"])
def test_the_planted_optimum_is_found(optimizer: str) -> None:
    if optimizer == "cma":
        pytest.importorskip("cma")
    net = network()
    space = Coefficients(net, NAMES)
    if optimizer == "gradient":
        found = descend(space, objective(net), steps=80, lr=0.05)
    else:
        found = minimise(space, objective(net), evaluations=120, optimizer=optimizer)
        assert len(found.history) <= 120
    assert found.coefficients.flatten().tolist() == pytest.approx([0.7, 0.25], abs=2e-3)
    assert found.value < 1e-5 < found.history[0]["value"]
    assert found.value == pytest.approx(evaluate(space, objective(net), found.coefficients))


def test_coefficients_by_site_are_found() -> None:
    net = network()
    sites = list(plait.adapters(net)["one"].deltas)
    wanted = {p: 0.2 + 0.15 * i for i, p in enumerate(sites)}
    loss = supervised(planted(net, {"one": wanted, "two": 0.5})[:1], squared)
    space = Coefficients(net, NAMES, grouping="site", start=0.5)
    found = descend(space, loss, steps=100, lr=0.05)
    got = found.weights()[0]
    assert max(abs(got[p] - wanted[p]) for p in sites) < 0.01


def test_the_merge_answers_as_the_coefficients_do() -> None:
    net = network()
    found = descend(Coefficients(net, NAMES, grouping="layer"), objective(net), steps=5, lr=0.1)
    assert found.space.groups == ["layers.0", "layers.1", "head"]
    found.activate()
    attached = net(inputs(9)).logits
    merged = found.merged()
    plain = network(())
    for path, delta in merged.deltas.items():
        plain.get_submodule(path).weight.data += delta.dense()
    torch.testing.assert_close(plain(inputs(9)).logits, attached)


def test_the_model_is_left_as_it_was() -> None:
    net = network().train()
    plait.activate(net, {"one": 0.5})
    before = net(inputs()).logits
    flags = [p.requires_grad for p in net.parameters()]
    descend(Coefficients(net, NAMES), objective(net), steps=2)
    assert net.training and [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(net(inputs()).logits, before)


def test_bounds_hold() -> None:
    net = network()
    space = Coefficients(net, NAMES, bounds=(0.0, 0.6))
    for found in (
        descend(space, objective(net), steps=20, lr=0.05),
        minimise(space, objective(net), evaluations=50),
    ):
        assert all(0 <= c <= 0.6 for e in found.history for row in e["point"] for c in row)
        assert float(found.coefficients[0]) == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("kind", ["gradient", "nelder-mead", "frank-wolfe"])
def test_a_killed_search_goes_on_where_it_was(kind: str, tmp_path: Path) -> None:
    net, data = network(), planted(network(), PLANTED)
    batches = [{"x": b["x"][i::4], "target": b["target"][i::4]} for b in data for i in range(4)]
    asked = []

    def run(file: Path, stop_after: int | None = None):
        asked.clear()
        inner = supervised(batches, squared, each=1, seed=3)

        def loss(model: nn.Module, step: int) -> Tensor:
            asked.append(step)
            if stop_after is not None and len(asked) > stop_after:
                raise KeyboardInterrupt
            return inner(model, step)

        space = Coefficients(net, NAMES)
        if kind == "gradient":
            return descend(space, loss, steps=11, log=file)
        if kind == "frank-wolfe":
            return frank_wolfe(space, loss, steps=11, log=file)
        return minimise(space, loss, evaluations=12, log=file)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_after=7)
    with (tmp_path / "cut").open("a") as file:
        file.write('{"point": [[0.')
    again = run(tmp_path / "cut")
    assert len(asked) == 5
    assert torch.equal(again.coefficients, whole.coefficients)
    assert again.history == whole.history
    assert (tmp_path / "cut").read_text() == (tmp_path / "whole").read_text()
    with pytest.raises(PlaitError, match="belongs to another search"):
        descend(Coefficients(net, NAMES, start=0.1), lambda m, s: m, log=tmp_path / "cut")


def test_a_log_of_other_data_is_refused(tmp_path: Path) -> None:
    net = network()
    descend(Coefficients(net, NAMES), objective(net), steps=3, log=tmp_path / "log")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    lines[2]["point"][0][0] += 0.5
    (tmp_path / "log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(PlaitError, match="another point as number 2"):
        descend(Coefficients(net, NAMES), objective(net), steps=3, log=tmp_path / "log")


def test_entropy_is_that_of_the_predictions() -> None:
    net = network()
    tasks = [[{"x": inputs(1)}], [{"x": inputs(2)}]]
    expected = 0.0
    plait.activate(net, PLANTED)
    for (batch,) in tasks:
        p = net(batch["x"]).logits.softmax(-1)
        expected -= float((p * p.log()).sum(-1).mean())
    space = Coefficients(net, NAMES)
    found = evaluate(space, entropy(tasks), torch.tensor([[0.7], [0.25]]))
    assert found == pytest.approx(expected, rel=1e-6)
    lower = descend(space, entropy(tasks), steps=30, lr=0.05)
    assert lower.value < lower.history[0]["value"]


def test_what_does_not_fit_is_said() -> None:
    net = network()
    with pytest.raises(UnknownNameError, match="did you mean 'one'"):
        Coefficients(net, ["on"])
    with pytest.raises(PlaitError, match="list of different"):
        Coefficients(net, "one")
    with pytest.raises(UnknownNameError, match="grouping"):
        Coefficients(net, NAMES, grouping="sites")  # type: ignore[arg-type]
    with pytest.raises(PlaitError, match="must lie in"):
        Coefficients(net, NAMES, form="sigmoid", start=1.5)
    with pytest.raises(PlaitError, match="start is"):
        Coefficients(net, NAMES, start=[1.0, 2.0, 3.0])
    with pytest.raises(PlaitError, match="returned no loss"):
        descend(Coefficients(net, NAMES), supervised([{"x": inputs()}]))
