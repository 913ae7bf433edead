"""The statistics on planted truths: an effect is found, none is not, and at the promised rate."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from plait.study.inference import draws, holm, interval, intervals, judge
from plait.study.spread import _inverse_trigamma, steady


def planted(
    effects: dict[str, float], seeds: int, examples: int, draw: np.random.Generator
) -> dict[str, np.ndarray]:
    """Scores with noise of seeds, of examples (shared and each method's own) and of cells."""
    shared = draw.normal(0, 1.0, examples)
    return {
        name: effect
        + shared
        + draw.normal(0, 0.3, examples)
        + draw.normal(0, 0.1, (seeds, 1))
        + draw.normal(0, 0.3, (seeds, examples))
        for name, effect in effects.items()
    }


def test_equal_methods_are_hardly_ever_told_apart() -> None:
    draw, trials = np.random.default_rng(0), 80
    equal = dict.fromkeys("abcd", 0.0)
    wins = [judge(planted(equal, 3, 60, draw)) for _ in range(trials)]
    wrong = sum(any(d.significant for d in v.differences) for v in wins)
    assert wrong <= 0.05 * trials  # err on the safe side: the method is conservative
    assert all(v.winner is None for v in wins if not any(d.significant for d in v.differences))


def test_a_large_effect_is_a_win_and_the_rest_stay_tied() -> None:
    draw = np.random.default_rng(1)
    verdict = judge(planted({"a": 0.0, "b": 1.5, "c": 0.0}, 4, 100, draw))
    assert verdict.winner == verdict.leader == "b" and verdict.tied == ["b"]
    lower = judge(planted({"a": 0.0, "b": 1.5, "c": 0.0}, 4, 100, draw), higher_is_better=False)
    assert lower.winner is None and set(lower.tied) == {"a", "c"}


def test_intervals_of_differences_cover_the_truth() -> None:
    draw, trials = np.random.default_rng(2), 100
    hits = 0
    for _ in range(trials):
        scores = planted({"a": 0.5, "b": 0.0}, 3, 40, draw)
        found = interval(scores["a"] - scores["b"])
        hits += found.low <= 0.5 <= found.high
    assert hits >= 0.93 * trials


def test_without_noise_of_seeds_it_is_the_bootstrap_over_examples() -> None:
    draw = np.random.default_rng(3)
    row = draw.normal(0, 1, 200)
    found = draws(np.stack([row, row, row]))
    assert found.std() == pytest.approx(row.std(ddof=1) / 200**0.5, rel=0.05)


def test_without_noise_of_examples_it_is_students_interval() -> None:
    from scipy import stats

    means = np.array([0.1, 0.4, 0.2])
    found = interval(np.repeat(means[:, None], 50, axis=1))
    low, high = stats.t.interval(0.95, 2, means.mean(), means.std(ddof=1) / 3**0.5)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)


def test_pairing_removes_what_is_hard_for_all() -> None:
    """A small steady gain is lost in each method's own interval, not in the difference's."""
    draw = np.random.default_rng(4)
    base = draw.normal(0, 5, 100) + draw.normal(0, 0.01, (3, 100))
    gain = 0.1 + draw.normal(0, 0.01, (3, 100))
    one, other = interval(base), interval(base + gain)
    assert one.high > other.low
    assert judge({"a": base, "b": base + gain}).winner == "b"


def test_one_seed_decides_nothing() -> None:
    verdict = judge({"a": [[1.0] * 50], "b": [[0.0] * 50]})
    assert verdict.leader == "a" and verdict.winner is None and verdict.tied == ["a", "b"]


def test_the_same_scores_are_a_tie() -> None:
    scores = np.random.default_rng(5).normal(size=(3, 30))
    (found,) = judge({"a": scores, "b": scores}).differences
    assert found.p == 1 and found.interval.low == found.interval.high == 0


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="unequal shapes"):
        judge({"a": np.zeros((3, 5)), "b": np.zeros((2, 5))})


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    """Oracle: a hypothesis falls when every family that holds it falls by Bonferroni."""
    draw = np.random.default_rng(6)
    for _ in range(20):
        p = draw.uniform(0, 0.2, 4)
        families = [s for r in range(1, 5) for s in itertools.combinations(range(4), r)]
        oracle = [
            max(min(1.0, len(s) * min(p[j] for j in s)) for s in families if i in s)
            for i in range(4)
        ]
        assert holm(list(p)) == pytest.approx(oracle)


def by_seed(
    effects: np.ndarray, noise: np.ndarray, seeds: int, draw: np.random.Generator
) -> dict[str, np.ndarray]:
    """Scores of one example: noise of the seeds alone, some of it shared by all methods."""
    shared = draw.normal(0, 0.5, seeds)
    return {
        f"m{i}": (e + shared + draw.normal(0, n, seeds))[:, None]
        for i, (e, n) in enumerate(zip(effects, noise, strict=True))
    }


@pytest.mark.parametrize("noise", [[1, 1, 1, 1, 1], [3, 1, 3, 1, 3], [5, 1, 1, 1, 1]])
def test_methods_that_scatter_differently_are_hardly_ever_told_apart(noise: list[int]) -> None:
    draw, trials = np.random.default_rng(7), 150
    wrong = 0
    for _ in range(trials):
        verdict = judge(by_seed(np.zeros(5), np.array(noise, float), 3, draw))
        wrong += len(verdict.tied) < 5
    assert wrong <= 0.08 * trials  # 5 % and two standard errors of this count


def test_three_seeds_are_enough_among_many_methods() -> None:
    """Each pair by itself has two degrees of freedom, and Holm's correction of 28 pairs: without
    the others' help hardly one in ten is found."""
    draw, trials, found = np.random.default_rng(8), 40, 0
    effects = np.array([-6.0] + [0.0] * 7)
    for _ in range(trials):
        found += "m0" not in judge(by_seed(effects, np.ones(8), 3, draw)).tied
    assert found >= 0.9 * trials


def test_intervals_of_many_methods_cover_their_truths() -> None:
    draw, hits, wide = np.random.default_rng(9), 0, 0
    for _ in range(60):
        scores = {f"m{i}": draw.normal(i, 1 + i % 3, (3, 1)) for i in range(8)}
        for i, (name, found) in enumerate(intervals(scores).items()):
            hits += found.low <= i <= found.high
            wide += (
                found.high - found.low > interval(scores[name]).high - interval(scores[name]).low
            )
    assert 0.92 * 480 <= hits <= 480 and wide < 240


def test_variances_are_steadied_as_their_law_says() -> None:
    from scipy import special

    draw, freedom, prior, scale = np.random.default_rng(10), 4, 10.0, 2.5
    true = scale * prior / draw.chisquare(prior, 4000)
    seen = true * draw.chisquare(freedom, 4000) / freedom
    found, degrees = steady(seen.tolist(), freedom, most=1000)
    assert degrees - freedom == pytest.approx(prior / 2, rel=0.15)  # half is counted
    borrowed = degrees - freedom
    by_law = (borrowed * scale + freedom * seen) / (borrowed + freedom)
    assert np.allclose(found, by_law, rtol=0.15)
    assert np.mean((np.log(found) - np.log(true)) ** 2) < np.mean((np.log(seen / true)) ** 2) / 2
    alike, whole = steady((draw.chisquare(4, 200) / 4).tolist(), 4, most=36)
    assert whole == 4 + 18 and np.ptp(alike) < 1.5
    for x in (0.3, 1.0, 7.5):
        assert _inverse_trigamma(float(special.polygamma(1, x))) == pytest.approx(x)


def test_variances_without_company_stay_as_they_are() -> None:
    assert steady([2.0], 2, 10) == ([2.0], 2.0)
    assert steady([0.0, 0.0, 1.0], 2, 10) == ([0.0, 0.0, 1.0], 2.0)
    assert steady([1.0, 3.0], 2, 0) == ([1.0, 3.0], 2.0)
