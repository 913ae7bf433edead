"""TIES, DARE and slerp against what the papers' formulas give on dense float64 matrices."""

from __future__ import annotations

import math

import pytest
import torch
from test_merge_kit import IN, OUT, dense, lows, run
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank


def ties_by_hand(matrices: list[Tensor], weights: list[float], density: float) -> Tensor:
    trimmed = []
    for m in matrices:
        kept = m.abs().flatten().sort(descending=True).values[int(density * m.numel() + 1e-6) - 1]
        trimmed.append(torch.where(m.abs() >= kept, m, 0))
    total = torch.zeros_like(matrices[0])
    for i in range(OUT):
        for j in range(IN):
            entries = [(w, float(t[i, j])) for w, t in zip(weights, trimmed, strict=True)]
            sign = 1 if sum(w * e for w, e in entries) >= 0 else -1
            agreeing = [(w, e) for w, e in entries if w * e * sign > 0]
            if agreeing:
                total[i, j] = sum(w * e for w, e in agreeing) / sum(abs(w) for w, _ in agreeing)
    return total


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 0.3, 0.2], [1.0, -0.5, 0.7]])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_is_the_paper_s_entry_by_entry(weights: list[float], density: float) -> None:
    given = lows(3)
    wanted = ties_by_hand([low.dense() for low in given], weights, density)
    found = run("ties", "delta", given, weights, density=density)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_aligned_ties_is_ties_on_the_coordinates_of_a_dense_svd() -> None:
    given = lows(3)
    matrices = [low.dense() for low in given]
    U, S, _ = torch.linalg.svd(torch.cat(matrices, 1), full_matrices=False)
    U = U[:, 1e-8 * S[0] < S]
    coordinates = [U.mT @ m for m in matrices]
    kept = [
        torch.where(c.abs() >= c.abs().flatten().topk(int(0.3 * c.numel())).values[-1], c, 0)
        for c in coordinates
    ]
    weighted = torch.stack([w * c for w, c in zip((0.5, 0.3, 0.2), kept, strict=True)])
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agree = weighted.sign() == sign
    w = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)[:, None, None]
    merged = torch.where(agree, weighted, 0).sum(0) / torch.where(agree, w, 0).sum(0).clamp_min(
        1e-9
    )
    found = dense(run("ties", "aligned", given, density=0.3))
    torch.testing.assert_close(found, U @ merged, atol=1e-6, rtol=1e-6)


def test_ties_lets_the_heavier_of_two_opposites_win() -> None:
    low = lows(1)[0]
    found = run("ties", "delta", [low, low * -0.4], [0.5, 0.5], density=1.0)
    torch.testing.assert_close(found, low.dense(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("space", ["factors", "delta"])
def test_dare_is_unbiased_and_its_error_is_the_formula_s(space: str) -> None:
    low = lows(1)[0]
    exact, density, found = low.dense(), 0.4, []
    from plait.merging import get_merge_method
    from plait.merging.changes import Changes
    from plait.merging.method import make_merge
    from plait.merging.spaces import merge_site

    way = make_merge(get_merge_method("dare"), {"density": density})
    for seed in range(600):
        found.append(dense(merge_site(way, Changes("s", [low], seed=seed), [1.0], space)))
    drawn = torch.stack(found)
    spread = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - exact).abs() <= 4.5 * spread + 1e-12).all()
    error = ((drawn - exact).square().sum((1, 2)).mean() / exact.square().sum()).sqrt()
    assert float(error) == pytest.approx(math.sqrt((1 - density) / density), rel=0.05)


def test_dare_restores_the_sum_of_magnitudes_where_asked() -> None:
    low = lows(1)[0]
    found = run("dare", "delta", [low], [1.0], density=0.3, rescale="l1")
    torch.testing.assert_close(found.abs().sum(), low.dense().abs().sum())
    assert 0.15 < (found != 0).double().mean() < 0.45


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    given = lows(2)
    a, b = (dense(run("dare", "delta", given)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, dense(run("dare", "delta", given[::-1])))


@pytest.mark.parametrize("norms", ["interpolated", "plain"])
@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_is_the_arc_between_two_matrices(t: float, norms: str) -> None:
    one, two = lows(2)
    x, y = one.dense(), two.dense()
    angle = torch.arccos((x * y).sum() / (x.norm() * y.norm()))
    a, b = ((1 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()
    if norms == "plain":
        wanted = a * x + b * y
    else:
        wanted = ((1 - t) * x.norm() + t * y.norm()) * (a * x / x.norm() + b * y / y.norm())
    for space in ("factors", "delta"):
        found = dense(run("slerp", space, [one, two], [1 - t, t], norms=norms))
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


def test_what_cannot_be_is_refused() -> None:
    for density in (0.0, 1.5):
        with pytest.raises(PlaitError, match="share in"):
            run("ties", "delta", lows(2), density=density)
    with pytest.raises(PlaitError, match="two inputs"):
        run("slerp", "factors", lows(3))
    low = LowRank(torch.zeros(3, 0), torch.zeros(0, 4))
    assert dense(run("linear", "factors", [low])).shape == (3, 4)
