"""Searches over merge options by depth: weighted sums in place, TIES and DARE-TIES merged anew."""

from __future__ import annotations

import pytest
import torch
from tasks import inputs, network, planted, squared
from torch import Tensor

import plait
from plait.errors import PlaitError
from plait.merging.search import Coefficients, evaluate, minimise, search, supervised
from plait.merging.search.merged import FoundMerge, MergedSpace
from plait.merging.search.methods.unconstrained_merging import by_depth

NAMES = ["one", "two"]
TIES = {"grouping": "layer", "bounds": (0.0, 1.0), "options": {"reduce": "sum"}}


def answers(net, weights) -> Tensor:
    plait.activate(net, weights)
    with torch.no_grad():
        return net(inputs(7)).logits


def paths_of(net) -> list[str]:
    return list(plait.adapters(net)["one"].deltas)


def test_groups_are_runs_of_layers() -> None:
    paths = [f"model.layers.{i}.{part}" for i in range(10) for part in ("q", "v")] + ["head"]
    group = by_depth(paths, 4)
    sizes = {name: sum(group(p) == name for p in paths) for name in map(group, paths)}
    assert list(sizes.values()) == [6, 6, 6, 3]
    assert group("model.layers.0.v") == "model.layers.0 to model.layers.2"
    assert group("head") == "model.layers.9 to head"
    assert len(set(map(by_depth(paths, 1), paths))) == 1
    assert len(set(map(by_depth(paths, 99), paths))) == 11


class Remembering(Coefficients):
    def use(self, coefficients: Tensor) -> None:
        self.last = coefficients.clone()
        super().use(coefficients)


def test_cma_reaches_the_least_of_a_quadratic() -> None:
    space = Remembering(network(), NAMES, grouping="layer", start=0.5, bounds=(0.0, 1.0))
    wanted = torch.tensor([[0.2, 0.7, 0.4], [0.6, 0.3, 0.5]], dtype=torch.float64)
    found = minimise(
        space,
        lambda model, step: (space.last - wanted).square().sum(),
        evaluations=700,
        optimizer="cma",
        spread=0.2,
    )
    assert found.value < 1e-6
    torch.testing.assert_close(found.coefficients, wanted, atol=1e-3, rtol=0)


def test_task_arithmetic_by_depth_finds_planted_weights() -> None:
    net = network()
    first = {p: 0.8 if "layers.0" in p else 0.2 for p in paths_of(net)}
    data = planted(net, {"one": first, "two": 0.4})
    found = search(
        net, NAMES, "unconstrained-merging", data, loss=squared, groups=3, evaluations=400
    )
    assert type(found).__name__ == "Found" and found.space.shape == (2, 3)
    assert found.history[0]["point"] == [[0.5] * 3] * 2
    assert found.value < 1e-3 * found.history[0]["value"]
    wanted = torch.tensor([[0.8, 0.2, 0.2], [0.4, 0.4, 0.4]], dtype=torch.float64)
    torch.testing.assert_close(found.coefficients, wanted, atol=0.1, rtol=0)


def test_one_group_is_plain_task_arithmetic() -> None:
    net = network()
    data = planted(net, {"one": 0.7, "two": 0.3})
    found = search(
        net, NAMES, "unconstrained-merging", data, loss=squared, groups=1, evaluations=60
    )
    assert found.space.shape == (2, 1)
    a, b = found.coefficients.flatten().tolist()
    plain = answers(net, {"one": a, "two": b})
    found.activate()
    with torch.no_grad():
        torch.testing.assert_close(net(inputs(7)).logits, plain)


@pytest.mark.parametrize("inner", ["ties", "dare-ties"])
def test_a_point_of_a_merged_space_is_that_merge(inner: str, tmp_path) -> None:
    net = network()
    space = MergedSpace(net, NAMES, inner, seed=5, **TIES)
    draw = torch.Generator().manual_seed(0)
    raw = torch.rand(4, 3, generator=draw, dtype=torch.float64)
    c = space.values(raw)
    assert float(c[2:].min()) >= 0.1 and float(c[2:].max()) <= 1
    torch.testing.assert_close(c[2:], 0.1 + 0.9 * raw[2:])
    seen = []
    with space.searching():
        space.use(c)
        with torch.no_grad():
            seen.append(net(inputs(7)).logits)
    assert list(plait.adapters(net)) == NAMES, "nothing is left on the model"
    known = [plait.adapters(net)[name] for name in NAMES]
    made = {}
    for path in paths_of(net):
        group = space.parts[path].groups[0]
        alike = plait.merge(
            known,
            inner,
            c[:2, group].tolist(),
            density=c[2:, group].tolist(),
            reduce="sum",
            seed=5,
        )
        made[path] = alike.deltas[path].dense()
    whole = space.merged(c, name="whole")
    for path, dense in made.items():
        torch.testing.assert_close(whole.deltas[path].dense(), dense)
    plait.load(net, whole.save(tmp_path / "whole"))
    torch.testing.assert_close(answers(net, "whole"), seen[0])


def test_weight_one_and_density_one_of_one_adapter_are_that_adapter() -> None:
    net = network()
    space = MergedSpace(net, NAMES, "ties", **TIES)
    for i, name in enumerate(NAMES):
        c = torch.cat([torch.zeros(2, 3), torch.ones(2, 3)]).double()
        c[i] = 1.0
        with space.searching():
            space.use(c)
            with torch.no_grad():
                found = net(inputs(7)).logits
        torch.testing.assert_close(found, answers(net, name))


@pytest.mark.parametrize("inner", ["ties", "dare-ties"])
def test_merges_that_drop_are_searched_and_end_as_one_adapter(inner: str, tmp_path) -> None:
    net = network()
    data = planted(net, {"one": 0.9, "two": 0.1})
    plait.activate(net, "two")
    options = {"inner": inner, "groups": 2, "evaluations": 40}
    log = tmp_path / "log"
    found = search(
        net, NAMES, "unconstrained-merging", data, loss=squared, seed=3, log=log, **options
    )
    assert isinstance(found, FoundMerge) and found.space.shape == (4, 2)
    assert len(found.history) == 40 and found.value < found.history[0]["value"]
    assert list(plait.adapters(net)) == NAMES
    merged = found.merged(name="end")
    assert merged.info["merge"]["method"] == "layered"
    objective = supervised(data, squared)
    asked = evaluate(found.space, objective, found.coefficients)
    assert asked == pytest.approx(found.value)
    path = merged.save(tmp_path / "end")
    plait.load(net, path)
    plait.activate(net, "end")
    with torch.no_grad():
        assert float(objective(net, 0)) == pytest.approx(found.value, rel=1e-4)
    again = search(
        net, NAMES, "unconstrained-merging", data, loss=squared, seed=3, log=log, **options
    )
    torch.testing.assert_close(again.coefficients, found.coefficients)


def test_layered_gives_each_site_its_own_options() -> None:
    net = network()
    known = [plait.adapters(net)[n] for n in NAMES]
    merged = plait.merge(
        known, "layered", inner="ties", options={"density": 0.4}, sites={"up": {"density": 1.0}}
    )
    for density, part in ((1.0, "up"), (0.4, "down"), (0.4, "head")):
        plain = plait.merge(known, "ties", density=density)
        for path in (p for p in merged.deltas if p.endswith(part)):
            torch.testing.assert_close(merged.deltas[path].dense(), plain.deltas[path].dense())
            bias = merged.deltas[path].bias()
            assert bias is None or torch.equal(bias, plain.deltas[path].bias())
    with pytest.raises(PlaitError, match="another one"):
        plait.merge(known, "layered", inner="layered")
