"""PLeaS on the rank axis of two adapters, against searches and solves by hand in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_merge_kit import IN, OUT, dense, lows, turned
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.methods.pleas import Pleas
from plait.merging.methods.regmean import RegMean

HALF = [0.5, 0.5]


def merged(given: list[LowRank], weights=HALF, grams=None, **options) -> LowRank:
    changes = Changes("s", given, statistics=grams)
    return Pleas(**options).merge(given, weights, changes)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def data(seed: int, rows: int = 60) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, IN, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("units", ["canonical", "stored"])
def test_a_permuted_twin_is_merged_to_itself_at_the_same_rank(units: str) -> None:
    low = lows(3)[2]
    order, sign = [2, 0, 3, 1], torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)
    twin = LowRank(low.B[:, order] * sign, (low.A[order].mT * sign).mT, low.scale)
    found = merged([low, twin], [0.3, 0.7], ratio=0.0, units=units)
    assert found.rank == 4
    close(dense(found), low.dense())
    negative = LowRank(-low.B, low.A, -low.scale)
    close(dense(merged([low, negative], ratio=0.0, units=units)), low.dense())


def test_a_turned_twin_needs_the_canonical_units() -> None:
    low = lows(1)[0]
    twin = turned(low, 3)
    close(dense(merged([low, twin], ratio=0.0)), low.dense())
    stored = dense(merged([low, twin], ratio=0.0, units="stored"))
    assert float((stored - low.dense()).norm()) > 0.05 * float(low.dense().norm())


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.8, -0.3], [0.0, 2.0]])
def test_ratio_one_is_the_weighted_sum(weights: list[float]) -> None:
    one, two = lows(2)
    found = merged([one, two], weights, ratio=1.0)
    assert found.rank == 5
    close(dense(found), weights[0] * one.dense() + weights[1] * two.dense())


@pytest.mark.parametrize(("ratio", "rank"), [(0.0, 4), (0.25, 5), (0.5, 6), (0.75, 7), (1.0, 8)])
def test_the_rank_is_what_the_ratio_says_also_with_ties(ratio: float, rank: int) -> None:
    four = lows(3)[2]
    same = LowRank(torch.eye(OUT, 4, dtype=torch.float64), torch.eye(4, IN, dtype=torch.float64))
    for given in ([four, turned(four, 1) * 0.3], [same, same]):
        assert merged(given, ratio=ratio, units="stored").rank == rank
    assert merged([lows(2)[0], lows(2)[1]], ratio=0.0).rank == 3  # of ranks 3 and 2


def units_of(low: LowRank) -> list[tuple[Tensor, Tensor]]:
    U, S, Vh = torch.linalg.svd(low.dense(), full_matrices=False)
    return [(U[:, j] * S[j].sqrt(), Vh[j] * S[j].sqrt()) for j in range(low.rank)]


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_pairs_are_the_best_of_all_assignments(ratio: float) -> None:
    """Every assignment tried, on dense singular vectors; signs by which of two means is longer."""
    one, two = lows(3)[2], lows(3, seed=4)[2]
    first, second = units_of(one), units_of(two)
    alike = torch.tensor([[(b @ c) * (a @ d) for c, d in second] for b, a in first])
    best = max(
        itertools.permutations(range(4)), key=lambda p: sum(alike[i, p[i]] for i in range(4))
    )
    pairs = sorted(enumerate(best), key=lambda pair: -float(alike[pair]))
    count = 4 - round(4 * ratio)
    wanted = torch.zeros(OUT, IN, dtype=torch.float64)
    for i, j in pairs[:count]:
        (b, a), (c, d) = first[i], second[j]
        mean = max(
            (((b + s * c) / 2, (a + s * d) / 2) for s in (1, -1)),
            key=lambda m: float(m[0].norm() ** 2 + m[1].norm() ** 2),
        )
        wanted += torch.outer(*mean)
    for i, j in pairs[count:]:
        wanted += torch.outer(*first[i]) / 2 + torch.outer(*second[j]) / 2
    close(dense(merged([one, two], ratio=ratio)), wanted)


def error(dW: Tensor, given: list[LowRank], inputs: list[Tensor], weights: list[float]) -> float:
    return sum(
        w * float((X @ (dW - low.dense()).mT).square().sum()) / len(X)
        for low, X, w in zip(given, inputs, weights, strict=True)
    )


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.9, 0.1]])
def test_the_fit_is_the_best_for_its_outputs_and_never_worse(ratio: float, weights) -> None:
    given, inputs = lows(2), [data(1), data(2, 40) * torch.linspace(0.1, 2, IN).double()]
    grams = [X.mT @ X / len(X) for X in inputs]
    plain = merged(given, weights, ratio=ratio)
    fitted = merged(given, weights, grams, ratio=ratio, least_squares=True, ridge=1e-12)
    assert fitted.rank == plain.rank
    before, after = (error(dense(m), given, inputs, weights) for m in (plain, fitted))
    assert after < before
    # The same least squares over stacked rows: sqrt(w/n) X_i A^T B^T against X_i dW_i^T.
    sizes = [(w / len(X)) ** 0.5 for w, X in zip(weights, inputs, strict=True)]
    X = torch.cat([s * x for s, x in zip(sizes, inputs, strict=True)])
    Y = torch.cat([s * x @ low.dense().mT for s, x, low in zip(sizes, inputs, given, strict=True)])
    free = torch.linalg.lstsq(X, Y).solution.mT
    B = plain.B
    close(dense(fitted), B @ torch.linalg.pinv(B) @ free, 1e-6)
    if ratio == 1:
        regmean = RegMean(shrink=1.0, ridge=1e-12)
        close(
            dense(fitted),
            dense(regmean.merge(given, weights, Changes("s", given, statistics=grams))),
        )


def test_the_fit_does_not_see_how_factors_are_turned() -> None:
    given, grams = lows(2), [X.mT @ X for X in (data(1), data(2))]
    other = [turned(low, i) for i, low in enumerate(given)]
    a, b = (merged(g, HALF, grams, least_squares=True) for g in (given, other))
    close(dense(a), dense(b))
    swapped = merged(given[::-1], HALF, grams[::-1], least_squares=True)
    close(dense(a), dense(swapped))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PlaitError, match="ratio is a share"):
        merged(lows(2), ratio=1.5)
    with pytest.raises(PlaitError, match="no gram statistic"):
        merged(lows(2), least_squares=True)
    zero = merged(lows(2), [0.0, 0.0])
    assert not dense(zero).any()
