"""WUDI and OptMerge against the papers' loss on dense float64 matrices."""

from __future__ import annotations

import math

import pytest
import torch
from test_merge_kit import IN, OUT, dense, lows, run
from torch import Tensor

import plait
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import get_merge_method, make_merge
from plait.merging.spaces import merge_site

THIRDS = [1 / 3] * 3
UNEVEN = [0.5, 0.3, 0.2]


def loss(theta: Tensor, taus: list[Tensor], weights: list[float]) -> Tensor:
    """WUDI's, as its code writes it, with an input's weight (1 / k: none) before its term."""
    terms = [
        len(taus) * w * ((theta - t) @ t.mT).square().sum() / t.square().sum()
        for t, w in zip(taus, weights, strict=True)
    ]
    return torch.stack(terms).sum()


def by_pinv(taus: list[Tensor], weights: list[float]) -> Tensor:
    k = len(taus)
    parts = [(k * w / t.square().sum(), t) for t, w in zip(taus, weights, strict=True)]
    C = sum(m * t.mT @ t for m, t in parts)
    D = sum(m * t @ t.mT @ t for m, t in parts)
    return D @ torch.linalg.pinv(C, rtol=1e-12, hermitian=True)


def gap(found: LowRank | Tensor, wanted: Tensor) -> float:
    return float((dense(found) - wanted).norm() / wanted.norm())


def cut(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def full_matrices(k: int = 3, rows: int = 10, columns: int = 8, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=g, dtype=torch.float64) for _ in range(k)]


def on_matrices(name: str, matrices: list[Tensor], weights=None, **options) -> Tensor:
    way = make_merge(get_merge_method(name), options)
    weights = weights or [1 / len(matrices)] * len(matrices)
    found = merge_site(way, Changes("layer", dense=matrices), weights, "delta")
    assert isinstance(found, Tensor)
    return found


# -- the exact minimum ----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [THIRDS, UNEVEN])
def test_the_minimum_in_factors_is_the_dense_one(weights: list[float]) -> None:
    given = lows(3)
    taus = [low.dense() for low in given]
    wanted = by_pinv(taus, weights)
    for space in ("factors", "delta"):
        assert gap(run("wudi", space, given, weights, solver="exact"), wanted) < 1e-8
    assert gap(on_matrices("wudi", taus, weights, solver="exact"), wanted) < 1e-8


def test_the_minimum_has_no_gradient_and_less_loss_than_the_sum_and_the_mean() -> None:
    taus = full_matrices()
    theta = on_matrices("wudi", taus, UNEVEN, solver="exact").requires_grad_()
    least = loss(theta, taus, UNEVEN)
    (gradient,) = torch.autograd.grad(least, theta)
    assert float(gradient.norm()) < 1e-10
    for other in (sum(taus), sum(taus) / 3):
        assert float(least.detach()) < float(loss(other, taus, UNEVEN))


def test_adapters_of_independent_row_spaces_are_all_met_exactly() -> None:
    given = lows(3)
    assert sum(low.rank for low in given) <= IN
    theta = dense(run("wudi", "factors", given, solver="exact"))
    assert float(loss(theta, [low.dense() for low in given], THIRDS)) < 1e-18


def test_orthogonal_row_spaces_add_up() -> None:
    g = torch.Generator().manual_seed(2)
    rows = torch.linalg.qr(torch.randn(IN, 6, generator=g, dtype=torch.float64)).Q.mT
    given = [
        LowRank(torch.randn(OUT, 2, generator=g, dtype=torch.float64), rows[i : i + 2], 1.5)
        for i in (0, 2, 4)
    ]
    total = sum(low.dense() for low in given)
    assert gap(run("wudi", "factors", given, solver="exact"), total) < 1e-9
    for name in ("wudi", "optmerge"):
        assert gap(run(name, "factors", given, UNEVEN, solver="exact"), total) < 1e-9


@pytest.mark.parametrize("solver", ["filtered", "exact", "sgd", "adam"])
@pytest.mark.parametrize("name", ["wudi", "optmerge"])
def test_one_input_alone_returns(name: str, solver: str) -> None:
    tau = full_matrices(1)[0]
    assert gap(on_matrices(name, [tau], solver=solver), tau) < 1e-9


# -- solvers that stop early ----------------------------------------------------------------------


def test_no_time_is_the_start_and_all_time_the_minimum() -> None:
    given, k = lows(3), 3
    taus = [low.dense() for low in given]
    mean = sum(w * t for w, t in zip(UNEVEN, taus, strict=True))
    for start, wanted in (("sum", k * mean), ("mean", mean)):
        found = run("wudi", "factors", given, UNEVEN, time=0.0, start=start)
        assert gap(found, wanted) < 1e-12
    found = run("wudi", "factors", given, UNEVEN, time=1e12)
    assert gap(found, by_pinv(taus, UNEVEN)) < 1e-8


def test_the_flow_is_what_small_steps_of_gradient_descent_do() -> None:
    """Steps of h / 2 on the loss are steps of h along l: n of them are a time of n h."""
    given = lows(3)
    taus = [low.dense() for low in given]
    theta, h = sum(taus).clone(), 1e-3
    for _ in range(2000):
        theta.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(theta, taus, THIRDS), theta)
        theta = (theta - h / 2 * gradient).detach()
    assert gap(run("wudi", "factors", given, THIRDS, time=2.0), theta) < 1e-3


def test_sgd_with_momentum_is_followed_to_the_last_digit() -> None:
    given = lows(3)
    taus = [low.dense() for low in given]
    theta = (sum(taus) / 3).requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.02, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        loss(theta, taus, THIRDS).backward()
        optimizer.step()
    options = {"solver": "sgd", "lr": 0.02, "steps": 40}
    for name in ("wudi", "optmerge"):
        start = {"start": "mean"} if name == "wudi" else {}
        found = run(name, "factors", given, THIRDS, **options, **start)
        assert gap(found, theta.detach()) < 1e-10


def test_adam_is_the_paper_s_loop() -> None:
    taus = [0.01 * t for t in full_matrices()]
    theta = sum(taus).clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=1e-5)
    for _ in range(50):
        optimizer.zero_grad()
        loss(theta, taus, THIRDS).backward()
        optimizer.step()
    found = on_matrices("wudi", taus, solver="adam", steps=50)
    assert gap(found, theta.detach()) < 1e-6
    assert float((found - sum(taus)).abs().max()) > 1e-4
    assert float(loss(found, taus, THIRDS)) < float(loss(sum(taus), taus, THIRDS))


def test_adam_needs_dw_itself() -> None:
    given = lows(2)
    found = run("wudi", "delta", given, [0.5, 0.5], solver="adam", steps=5)
    matrices = [low.dense() for low in given]
    torch.testing.assert_close(found, on_matrices("wudi", matrices, solver="adam", steps=5))
    way = make_merge(get_merge_method("wudi"), {"solver": "adam"})
    assert way.spaces == ("delta",)


@pytest.mark.parametrize(("keep", "count"), [(0.5, 4), (0.65, 6), (1.0, 8), ("adaptive", None)])
def test_only_the_strong_directions_settle(keep, count) -> None:
    taus = [t * torch.logspace(0, -1, 8).double() for t in full_matrices()]
    C = sum(t.mT @ t / t.square().sum() for t in taus)
    values, V = torch.linalg.eigh(C)
    if count is None:
        count = math.ceil(float(values.sqrt().sum() ** 2 / values.sum()))
        assert count < 8
    top = V[:, -count:]
    start = sum(taus)
    wanted = start + (by_pinv(taus, THIRDS) - start) @ top @ top.mT
    assert gap(on_matrices("wudi", taus, solver="exact", keep=keep), wanted) < 1e-9


def test_adapters_from_one_start_of_a_do_not_blow_up() -> None:
    """Their row spaces nearly coincide: the minimum is huge, the flow stays near the inputs."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(3, IN, generator=g, dtype=torch.float64)
    given = [
        LowRank(
            torch.randn(OUT, 3, generator=g, dtype=torch.float64),
            A + 1e-3 * torch.randn(3, IN, generator=g, dtype=torch.float64),
        )
        for _ in range(2)
    ]
    largest = max(float(low.norm()) for low in given)
    halves = [0.5, 0.5]
    assert float(dense(run("wudi", "factors", given, halves, solver="exact")).norm()) > 50 * largest
    assert float(dense(run("wudi", "factors", given, halves)).norm()) < 2 * largest


# -- OptMerge -------------------------------------------------------------------------------------


def optmerge_by_hand(
    taus: list[Tensor], weights: list[float], rank: int, full: bool, time: float | None
) -> Tensor:
    k = len(taus)
    mean = sum(w * t for w, t in zip(weights, taus, strict=True))
    C = D = 0
    for t, w in zip(taus, weights, strict=True):
        _, S, Vh = torch.linalg.svd(t, full_matrices=False)
        projector = S[:rank, None] * Vh[:rank]
        target = mean + cut(t - mean, rank) if full else cut(t, rank)
        gram = k * w / t.square().sum() * projector.mT @ projector
        C, D = C + gram, D + target @ gram
    start = k * mean if full else mean
    values, V = torch.linalg.eigh(C)
    there = values > 1e-12 * values[-1]
    f = there.double() if time is None else there * (1 - (-values * time).exp())
    minimum = D @ torch.linalg.pinv(C, rtol=1e-12, hermitian=True)
    return start + (minimum - start) @ V @ torch.diag(f) @ V.mT


@pytest.mark.parametrize("weights", [THIRDS, UNEVEN])
@pytest.mark.parametrize("variant", ["lora", "full"])
@pytest.mark.parametrize("time", [300.0, None])
def test_optmerge_is_the_dense_one(variant: str, weights: list[float], time: float | None) -> None:
    solver = {"solver": "exact"} if time is None else {"time": time}
    full = variant == "full"
    given = lows(3)
    taus = [low.dense() for low in given]
    for kept in (None, 2):
        wanted = optmerge_by_hand(taus, weights, kept or min(OUT, IN) // 3, full, time)
        for space in ("factors", "delta"):
            found = run("optmerge", space, given, weights, variant=variant, kept=kept, **solver)
            assert gap(found, wanted) < 1e-7
    matrices = full_matrices()
    wanted = optmerge_by_hand(matrices, weights, 8 // 3, full, time)
    found = on_matrices("optmerge", matrices, weights, variant=variant, **solver)
    assert gap(found, wanted) < 1e-7


def test_optmerge_cuts_nothing_of_thin_adapters_and_is_wudi_from_the_mean() -> None:
    given = lows(3)
    wanted = dense(run("wudi", "factors", given, start="mean"))
    assert gap(run("optmerge", "factors", given), wanted) < 1e-9


# -- what goes in ---------------------------------------------------------------------------------


def test_vectors_and_named_sites_take_the_weighted_mean() -> None:
    rows = [torch.randn(1, 6, dtype=torch.float64) for _ in range(2)]
    torch.testing.assert_close(on_matrices("wudi", rows), (rows[0] + rows[1]) / 2)
    taus, way = full_matrices(2), get_merge_method("wudi")
    site = Changes("model.embed_tokens", dense=taus)
    found = merge_site(make_merge(way, {}), site, [0.5, 0.5], "delta")
    torch.testing.assert_close(found, (taus[0] + taus[1]) / 2)
    moved = merge_site(make_merge(way, {"averaged": []}), site, [0.5, 0.5], "delta")
    assert gap(moved, found) > 0.1


@pytest.mark.parametrize(
    "options", [{"keep": 0.0}, {"keep": "most"}, {"time": -1.0}, {"solver": "newton"}]
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(PlaitError, match="wudi"):
        run("wudi", "factors", lows(2), **options)


def test_negative_weights_are_refused() -> None:
    for name in ("wudi", "optmerge"):
        with pytest.raises(PlaitError, match="negative"):
            run(name, "factors", lows(2), [1.0, -0.5])


def test_adapters_merge_by_name_without_a_dense_matrix() -> None:
    from plait.adapter.convert import lora_from
    from plait.adapter.site import LinearSite

    site = LinearSite("block.0.proj", (OUT, IN))
    made = [lora_from(f"a{i}", [site], {site.path: low}, {}) for i, low in enumerate(lows(3))]
    merged = plait.merge(made, "wudi", solver="exact")
    assert merged.info["merge"]["space"] == "factors"
    wanted = by_pinv([low.dense() for low in lows(3)], THIRDS)
    assert gap(merged.deltas[site.path].dense().detach().double(), wanted) < 1e-5
