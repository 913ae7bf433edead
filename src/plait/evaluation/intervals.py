"""95 % intervals for what was measured on a sample of examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054


def wilson(successes: int, count: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; right for small counts and for 0 or all of them."""
    if count == 0:
        return 0.0, 1.0
    p, zz = successes / count, z * z
    centre = (p + zz / (2 * count)) / (1 + zz / count)
    half = z * math.sqrt(p * (1 - p) / count + zz / (4 * count * count)) / (1 + zz / count)
    # At the ends the formula gives 0 and 1 exactly, up to rounding.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == count else min(1.0, centre + half)
    return low, high


def bootstrap(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of sum(values) / sum(weights), examples drawn with replacement.

    `weights` None counts each example once (a mean). The same seed gives the same interval.
    """
    top = np.asarray(values, dtype=np.float64)
    bottom = np.ones_like(top) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(top) == 0:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    ratios = np.empty(draws)
    for i in range(draws):  # one row at a time: draws x examples may not fit
        chosen = random.integers(0, len(top), len(top))
        ratios[i] = top[chosen].sum() / bottom[chosen].sum()
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
