"""How far seeds scatter when there are few of them: each estimate is steadied by all the others.

Three seeds leave two degrees of freedom, with which Student's t tells hardly anything apart. But a
bake-off has many such estimates s² (one a pair of methods), and their logarithms show how much true
variances differ. If those follow a scaled inverse chi-square law,

    log s²:  mean -> log s0² (up to known constants),   variance - psi'(d / 2) = psi'(d0 / 2)
    steadied variance = (d0 s0² + d s²) / (d0 + d),     with d0 + d degrees of freedom

Where all scatter alike, d0 is large and they are pooled; where they differ, d0 is small and each
stands by itself. Smyth, "Linear Models and Empirical Bayes Methods", 2004, sections 5 and 6. Only
half of d0 is counted, and never more than what the other methods can tell: the law is a model, and
one method that is far noisier than the rest must not borrow their calm
(`tests/study/test_inference.py` simulates that).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

TRUST = 0.5
"""The share of the prior's degrees of freedom that is counted."""
LEAST = 0.01
"""Of the median: what a smaller variance (seeds that agree by rounding) is taken for in the fit."""


def steady(variances: Sequence[float], freedom: int, most: float) -> tuple[list[float], float]:
    """The variances (of `freedom` degrees each) as steadied by one another, and their degrees.

    At most `most` degrees are borrowed. Unchanged where there are fewer than two, or mostly zeros.
    """
    found = np.asarray(variances, dtype=np.float64)
    middle = float(np.median(found)) if len(found) else 0.0
    if len(found) < 2 or not middle > 0:
        return list(variances), float(freedom)
    logs = np.log(np.maximum(found, LEAST * middle))
    centred = logs - _digamma(freedom / 2) + math.log(freedom / 2)
    excess = float(centred.var(ddof=1)) - _polygamma(1, freedom / 2)
    common = float(centred.mean())
    prior = math.inf if excess <= 0 else 2 * _inverse_trigamma(excess)
    if math.isfinite(prior):
        common += _digamma(prior / 2) - math.log(prior / 2)
    borrowed = TRUST * min(prior, most)
    whole = borrowed + freedom
    return [(borrowed * math.exp(common) + freedom * v) / whole for v in found.tolist()], whole


def _inverse_trigamma(value: float) -> float:
    """x with psi'(x) = value, by Newton's method on 1 / psi', which is nearly a line."""
    x = 0.5 + 1 / value
    for _ in range(50):
        found = _polygamma(1, x)
        step = found * (1 - found / value) / _polygamma(2, x)
        x += step
        if abs(step) < 1e-10 * x:
            break
    return x


def _digamma(x: float) -> float:
    return float(torch.special.digamma(torch.tensor(x, dtype=torch.float64)))


def _polygamma(order: int, x: float) -> float:
    return float(torch.special.polygamma(order, torch.tensor(x, dtype=torch.float64)))
