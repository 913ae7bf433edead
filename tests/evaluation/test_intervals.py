"""Intervals: published values, and coverage of what they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plait.evaluation import bootstrap, wilson


@pytest.mark.parametrize(
    "successes, count, low, high",
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_values(
    successes: int, count: int, low: float, high: float
) -> None:
    found = wilson(successes, count)
    assert found == pytest.approx((low, high), abs=6e-5)


def test_wilson_at_the_ends() -> None:
    assert wilson(20, 20)[1] == 1.0 and wilson(20, 20)[0] == pytest.approx(1 - 0.1611, abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_of_a_mean_is_near_the_normal_interval_and_reproducible() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400).tolist()
    low, high = bootstrap(values)
    half = 1.96 * np.std(values) / math.sqrt(400)
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.03)
    assert bootstrap(values) == (low, high)


def test_bootstrap_of_a_ratio_weighs_examples_by_their_size() -> None:
    assert bootstrap([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (2.0, 2.0)
    assert all(map(math.isnan, bootstrap([])))
