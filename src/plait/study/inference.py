"""What repeated runs allow one to say about which of several methods is better.

Every method has scores [seeds, examples]: the same seeds (data order and start) and the same test
examples for all, so that differences are taken pair by pair and what is hard for everyone drops
out. Two things would differ in another experiment, the seeds and the examples:

    draw = mean + t * spread of seed means / sqrt(seeds) + bootstrap of the examples' effects

with t from Student's distribution: resampling three seeds would understate their spread twofold.
The spread is that pair's own, steadied by the other pairs' (`spread`). The sum counts the noise of
single cells twice, so that intervals err on the wide side. Of all pairwise p-values Holm's
correction is taken: the leader is chosen after the scores are known. With one seed nothing can be
decided, and nothing is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plait.study.spread import steady

Array = np.ndarray[Any, np.dtype[np.float64]]
DRAWS = 20_000
LEVEL = 0.05


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; without bounds (NaN) when there was one seed only."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.4g} (one seed)"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Difference:
    """How much better `a` is than `b`, pair by pair (negative: worse)."""

    a: str
    b: str
    interval: Interval
    p: float
    """Two-sided, of this pair alone."""
    adjusted: float
    """After Holm's correction over all pairs."""

    @property
    def significant(self) -> bool:
        return self.adjusted < LEVEL


@dataclass(frozen=True)
class Verdict:
    """Who leads, whether that is a win, and who cannot be told from the leader."""

    leader: str
    winner: str | None
    """The leader, where it is significantly better than every other; else None."""
    tied: list[str]
    """The leader and all that are not significantly worse."""
    means: dict[str, float]
    differences: list[Difference] = field(default_factory=list, repr=False)

    def against_leader(self, name: str) -> Difference | None:
        """Leader minus `name`."""
        return next((d for d in self.differences if (d.a, d.b) == (self.leader, name)), None)


@dataclass(frozen=True)
class Scatter:
    """The variance of a seed's mean score, and the degrees of freedom that it was found with."""

    variance: float
    freedom: float


def draws(scores: Any, count: int = DRAWS, seed: int = 0, scatter: Scatter | None = None) -> Array:
    """Plausible values of the mean of `scores` [seeds, examples]; NaN from a single seed.

    `scatter` None is that of these seeds alone.
    """
    table = np.asarray(scores, dtype=np.float64)
    seeds, examples = table.shape
    random = np.random.default_rng(seed)
    if seeds < 2:
        return np.full(count, np.nan)
    scatter = scatter or Scatter(_variance(table), seeds - 1)
    spread = math.sqrt(scatter.variance / seeds)
    effects = table.mean(0) - table.mean()
    # A sample of n spreads by (n - 1) / n less than what it was drawn from.
    effects = effects * math.sqrt(examples / max(1, examples - 1))
    found = table.mean() + spread * random.standard_t(scatter.freedom, count)
    block = max(1, 2_000_000 // examples)  # draws x examples may not fit
    for start in range(0, count, block):
        size = min(block, count - start)
        chosen = random.integers(0, examples, (size, examples))
        found[start : start + size] += effects[chosen].mean(1)
    return found


def scatters(tables: Sequence[Array], contenders: int) -> list[Scatter | None]:
    """Of each of several tables of one shape that so many contenders made, steadied by the others;
    None from a single seed."""
    seeds = len(tables[0]) if tables else 0
    if seeds < 2:
        return [None] * len(tables)
    known = [_variance(table) for table in tables]
    variances, freedom = steady(known, seeds - 1, (contenders - 2) * (seeds - 1))
    return [Scatter(v, freedom) for v in variances]


def intervals(scores: Mapping[str, Any]) -> dict[str, Interval]:
    """Each method's mean with its 95 % interval; those of equally many seeds steady each other."""
    tables = {name: np.asarray(s, dtype=np.float64) for name, s in scores.items()}
    found: dict[str, Interval] = {}
    for shape in {t.shape for t in tables.values()}:
        alike = {name: t for name, t in tables.items() if t.shape == shape}
        known = zip(alike.items(), scatters(list(alike.values()), len(alike)), strict=True)
        found |= {name: interval(table, scatter=s) for (name, table), s in known}
    return found


def _variance(table: Array) -> float:
    """Of the seeds' means."""
    return float(table.mean(1).var(ddof=1))


def interval(scores: Any, seed: int = 0, scatter: Scatter | None = None) -> Interval:
    """The mean of `scores` [seeds, examples] with its 95 % interval."""
    return _bounds(scores, draws(scores, seed=seed, scatter=scatter))


def _bounds(scores: Any, found: Array) -> Interval:
    """The mean of `scores`, between the outermost of its plausible values."""
    low, high = np.percentile(found, [2.5, 97.5]) if len(scores) > 1 else (math.nan, math.nan)
    return Interval(float(np.mean(scores)), float(low), float(high))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: rejecting below 0.05 errs in 5 % of families at most."""
    adjusted, running = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running = max(running, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = running
    return adjusted


def judge(scores: Mapping[str, Any], higher_is_better: bool = True) -> Verdict:
    """Compare methods by their scores [seeds, examples] of the same seeds and examples.

    The differences run from the better mean to the worse. Raises ValueError where shapes differ.
    """
    sign = 1.0 if higher_is_better else -1.0
    tables = {name: np.asarray(s, dtype=np.float64) for name, s in scores.items()}
    if len({t.shape for t in tables.values()}) != 1:
        raise ValueError(f"scores of unequal shapes: { ({n: t.shape for n, t in tables.items()}) }")
    means = {name: float(t.mean()) for name, t in tables.items()}
    order = sorted(means, key=lambda name: -sign * means[name])
    pairs = list(itertools.combinations(order, 2))
    gaps = [sign * (tables[a] - tables[b]) for a, b in pairs]
    known = scatters(gaps, len(tables))
    found = [_difference(gap, scatter) for gap, scatter in zip(gaps, known, strict=True)]
    adjusted = holm([p for _, p in found])
    differences = [
        Difference(a, b, inside, p, q)
        for (a, b), (inside, p), q in zip(pairs, found, adjusted, strict=True)
    ]
    worse = {d.b for d in differences if d.a == order[0] and d.significant}
    tied = [name for name in order if name not in worse]
    winner = order[0] if len(tied) == 1 and len(order) > 1 else None
    return Verdict(order[0], winner, tied, means, differences)


def _difference(table: Array, scatter: Scatter | None) -> tuple[Interval, float]:
    found = draws(table, scatter=scatter)
    if len(table) < 2:
        return Interval(float(table.mean()), math.nan, math.nan), 1.0
    # Counting the observation itself keeps p from being 0.
    tail = 1 + min((found <= 0).sum(), (found >= 0).sum())
    return _bounds(table, found), float(min(1.0, 2 * tail / (len(found) + 1)))
