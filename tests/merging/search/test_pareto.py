"""Quadratic surrogates and the fronts between them, against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from plait.errors import PlaitError, UnknownNameError
from plait.merging.search.pareto import fit_quadratic, front, nondominated, terms


def quadratic(seed: int, n: int):
    g = torch.Generator().manual_seed(seed)
    A, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, n), (n,)))
    return lambda c: ((c @ A) * c).sum(-1) + c @ b + 0.3


def uniform(rows: int, n: int, seed: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(rows, n, generator=g, dtype=torch.float64)


BEND = {
    "identity": lambda v: v,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
}


@pytest.mark.parametrize("link", ["identity", "sigmoid", "softplus"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_an_exact_quadratic_is_recovered_from_as_many_points_as_unknowns(link: str, n: int) -> None:
    true, bend = quadratic(1, n), BEND[link]
    points, others = uniform(terms(n), n), uniform(50, n, seed=6)
    fitted = fit_quadratic(points, bend(true(points)), link, ridge=1e-22)
    tolerance = 1e-6 if link == "identity" else 1e-5
    torch.testing.assert_close(fitted(others), bend(true(others)), rtol=tolerance, atol=tolerance)
    assert math.isnan(fitted.held_out_r2)
    with pytest.raises(PlaitError, match="unknowns"):
        fit_quadratic(points[:-1], true(points[:-1]))


def by_hand(points: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Least squares by the normal equations on features in another order."""

    def features(c: Tensor) -> Tensor:
        products = [c[:, i] * c[:, j] for i in range(c.shape[1]) for j in range(i + 1)]
        return torch.stack([torch.ones(len(c), dtype=c.dtype), *c.T, *products], 1)

    X = features(points)
    return features(at) @ torch.linalg.solve(X.T @ X, X.T @ values)


def test_errors_are_those_of_fits_without_each_point() -> None:
    points = uniform(20, 2)
    noise = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = quadratic(2, 2)(points) + 0.1 * noise
    fitted = fit_quadratic(points, values, ridge=1e-22)
    others = uniform(30, 2, seed=8)
    torch.testing.assert_close(fitted(others), by_hand(points, values, others))
    for i in range(20):
        rest = torch.arange(20) != i
        alone = by_hand(points[rest], values[rest], points[i : i + 1])
        assert float(fitted.errors[i]) == pytest.approx(float(values[i] - alone), rel=1e-5)
    spread = float((values - values.mean()).square().sum())
    assert fitted.held_out_r2 == pytest.approx(1 - float(fitted.errors.square().sum()) / spread)
    assert fitted.held_out_r2 < fitted.r2 < 1


def test_gauss_newton_goes_to_the_least_squares_of_the_accuracies_themselves() -> None:
    from scipy.optimize import least_squares

    points, g = uniform(40, 2), torch.Generator().manual_seed(1)
    shares = torch.sigmoid(3 * quadratic(3, 2)(points))
    seen = torch.bernoulli(shares.expand(25, -1), generator=g).mean(0)
    i, j = torch.triu_indices(2, 2)
    X = torch.cat([points[:, i] * points[:, j], points, torch.ones(40, 1).double()], 1).numpy()

    def off(w):
        return 1 / (1 + pow(2.718281828459045, -(X @ w))) - seen.numpy()

    best = 2 * least_squares(off, [0.0] * 6, xtol=1e-14, ftol=1e-14).cost
    rough = fit_quadratic(points, seen, "sigmoid", refine=0)
    fine = fit_quadratic(points, seen, "sigmoid", refine=50)
    errors = [float((f(points) - seen).square().sum()) for f in (rough, fine)]
    assert errors[1] == pytest.approx(best, rel=1e-5) and errors[0] > 1.01 * best


def test_nondominated_is_what_pairs_say() -> None:
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    kept = nondominated(values)
    for i, row in enumerate(values.tolist()):
        others = values.tolist()
        beaten = any(all(b >= a for a, b in zip(row, o, strict=True)) and o != row for o in others)
        assert bool(kept[i]) is not beaten


def bowl(center: list[float]):
    return lambda c: -(c - torch.tensor(center, dtype=torch.float64)).square().sum(-1)


def bowls(*centers: list[float]):
    points = uniform(30, len(centers[0]), seed=0)
    return [fit_quadratic(points, bowl(c)(points)) for c in centers]


EDGES = torch.zeros(2).double(), torch.ones(2).double()


def test_the_front_between_two_bowls_is_the_segment_between_them() -> None:
    fits = bowls([0.2, 0.8], [0.8, 0.2])
    found = front(fits, EDGES, size=25)
    assert bool(nondominated(torch.stack([f(found) for f in fits], 1)).all())
    assert (found.sum(1) - 1).abs().max() < 0.02
    assert found[:, 0].min() == pytest.approx(0.2, abs=0.01)
    assert found[:, 0].max() == pytest.approx(0.8, abs=0.01)
    assert torch.equal(found, front(fits, EDGES, size=25))
    one = front(fits[:1], EDGES, size=10)
    assert one.shape[0] == 1 and one[0].tolist() == pytest.approx([0.2, 0.8], abs=1e-3)


def hypervolume(values: Tensor, least: Tensor) -> float:
    """By 20,000 random points: the share of the box above `least` that some row dominates."""
    g = torch.Generator().manual_seed(0)
    draws = least + (0 - least) * torch.rand(20_000, len(least), generator=g).double()
    held = torch.zeros(len(draws), dtype=torch.bool)
    for row in values:
        held |= (draws <= row).all(1)
    return float(held.double().mean())


@pytest.mark.parametrize("solver", ["own", "nsga3"])
@pytest.mark.parametrize("tasks", [2, 3])
def test_fronts_hold_what_a_dense_grid_holds(solver: str, tasks: int) -> None:
    if solver == "nsga3":
        pytest.importorskip("pymoo")
    fits = bowls([0.2, 0.8], [0.8, 0.2], [0.1, 0.1])[:tasks]
    line = torch.linspace(0, 1, 101, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    values = torch.stack([f(grid) for f in fits], 1)
    best = values[nondominated(values)]
    found = front(fits, EDGES, size=60, solver=solver)
    reached = torch.stack([f(found) for f in fits], 1)
    assert len(found) <= 60 and bool(((found >= 0) & (found <= 1)).all())
    assert bool(nondominated(reached).all())
    least = best.amin(0)
    share = 0.95 if tasks == 2 else 0.9  # sixty points leave gaps on a surface
    assert hypervolume(reached, least) > share * hypervolume(best, least)
    assert (reached.amax(0) - best.amax(0)).abs().max() < 0.02


def test_an_unknown_solver_is_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'nsga3'"):
        front(bowls([0.2, 0.8]), EDGES, solver="nsga2")  # type: ignore[arg-type]
