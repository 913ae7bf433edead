"""Quadratic surrogates, fronts, and MAP on a model."""

from __future__ import annotations

import pytest
import torch
from tasks import network, planted, squared
from torch import Tensor

from plait.errors import PlaitError
from plait.merging.search import Coefficients, evaluate
from plait.merging.search.methods.map import map_merging
from plait.merging.search.pareto import fit_quadratic, front, nondominated, terms


def quadratic(seed: int, n: int):
    g = torch.Generator().manual_seed(seed)
    A, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, n), (n,)))
    return lambda c: ((c @ A) * c).sum(-1) + c @ b + 0.3


@pytest.mark.parametrize("link", ["identity", "sigmoid", "softplus"])
def test_an_exact_quadratic_is_recovered_from_as_many_points_as_unknowns(link: str) -> None:
    g = torch.Generator().manual_seed(5)
    true = quadratic(1, 3)
    points = torch.rand(terms(3), 3, generator=g, dtype=torch.float64)
    others = torch.rand(50, 3, generator=g, dtype=torch.float64)
    bend = {
        "identity": lambda v: v,
        "sigmoid": torch.sigmoid,
        "softplus": torch.nn.functional.softplus,
    }[link]
    fitted = fit_quadratic(points, bend(true(points)), link, ridge=1e-22)
    torch.testing.assert_close(fitted(others), bend(true(others)), rtol=1e-5, atol=1e-6)
    with pytest.raises(PlaitError, match="unknowns"):
        fit_quadratic(points[:-1], true(points[:-1]))


def test_nondominated_is_what_pairs_say() -> None:
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    kept = nondominated(values)
    for i, row in enumerate(values.tolist()):
        others = values.tolist()
        beaten = any(all(b >= a for a, b in zip(row, o, strict=True)) and o != row for o in others)
        assert bool(kept[i]) is not beaten


def bowl(center: list[float]):
    return lambda c: -(c - torch.tensor(center, dtype=torch.float64)).square().sum(-1)


def test_the_front_between_two_bowls_is_the_segment_between_them() -> None:
    points = torch.rand(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fits = [fit_quadratic(points, bowl(c)(points)) for c in ([0.2, 0.8], [0.8, 0.2])]
    edges = torch.zeros(2).double(), torch.ones(2).double()
    found = front(fits, edges, size=25)
    assert bool(nondominated(torch.stack([f(found) for f in fits], 1)).all())
    assert (found.sum(1) - 1).abs().max() < 0.02
    assert found[:, 0].min() == pytest.approx(0.2, abs=0.01)
    assert found[:, 0].max() == pytest.approx(0.8, abs=0.01)
    assert torch.equal(found, front(fits, edges, size=25))
    one = front(fits[:1], edges, size=10)
    assert one.shape[0] == 1 and one[0].tolist() == pytest.approx([0.2, 0.8], abs=1e-3)


def test_map_asks_the_model_as_often_as_it_says_and_finds_both_ends(tmp_path) -> None:
    net = network(size=0.2)
    tasks = [planted(net, w)[0] for w in ({"one": 0.9, "two": 0.2}, {"one": 0.2, "two": 0.8})]
    asked: list[int] = []

    def metrics(model) -> list[Tensor]:
        asked.append(1)
        return [-squared(model, task) for task in tasks]

    found = map_merging(net, ["one", "two"], metrics, size=30, log=tmp_path / "log")
    assert len(asked) == 12 == len(found.history)
    assert all(s.r2 > 0.98 for s in found.surrogates)
    assert found.points.min() >= 0 and found.points.max() <= 1
    for i, wanted in enumerate([[0.9, 0.2], [0.2, 0.8]]):
        chosen = found.choose([1.0 - i, float(i)])
        assert chosen.coefficients.flatten().tolist() == pytest.approx(wanted, abs=0.12)
        space = Coefficients(net, ["one", "two"])
        loss = evaluate(space, lambda m, s, i=i: squared(m, tasks[i]), chosen.coefficients)
        middle = evaluate(space, lambda m, s, i=i: squared(m, tasks[i]), torch.full((2, 1), 0.5))
        assert loss < 0.3 * middle
    again = map_merging(net, ["one", "two"], metrics, size=30, log=tmp_path / "log")
    assert len(asked) == 12 and torch.equal(again.points, found.points)
    with pytest.raises(PlaitError, match="at least 6 evaluations"):
        map_merging(net, ["one", "two"], metrics, evaluations=5)
