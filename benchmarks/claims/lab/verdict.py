"""From figures to a verdict, by rules that are fixed before the run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHOWN, NOT_SHOWN, CONTRADICTED = "shown", "not shown at this scale", "contradicted"
# Two-sided 95 % points of Student's t, by degrees of freedom.
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Outcome = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """`outcome` is one of SHOWN, NOT_SHOWN, CONTRADICTED; `reason` is one sentence with figures."""

    outcome: str
    reason: str


def figures(outcome: Outcome, label: str, metric: str = "loss") -> list[float]:
    """A contender's test figures at its tuned learning rate, in the order of the seeds.

    `metric` is "loss", "accuracy", "seconds", or "train" for the mean training loss over the last
    tenth of the steps.
    """
    trials = outcome["contenders"][label]["trials"]
    if metric in ("loss", "accuracy"):
        return [t["test"][metric] for t in trials]
    if metric == "train":
        return [statistics.fmean(t["curve"][-max(1, len(t["curve"]) // 10) :]) for t in trials]
    return [t[metric] for t in trials]


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) of paired differences."""
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return mean, math.inf
    half = STUDENT.get(count - 1, 2.0) * statistics.stdev(differences) / math.sqrt(count)
    return mean, half


def compare(
    outcome: Outcome, ours: str, theirs: str, metric: str = "loss", margin: float = 0.0
) -> Verdict:
    """Is `ours` better than `theirs` (or at most `margin` worse), seed by seed?

    Shown where the 95 % interval of the paired difference lies on the claim's side, contradicted
    where it lies on the other, not shown where it covers both.
    """
    a, b = figures(outcome, ours, metric), figures(outcome, theirs, metric)
    sign = 1 if metric == "accuracy" else -1
    gains = [sign * (x - y) + margin for x, y in zip(a, b, strict=True)]
    mean, half = interval(gains)
    outcome_ = SHOWN if mean - half > 0 else CONTRADICTED if mean + half < 0 else NOT_SHOWN
    allowed = f", {margin:g} allowed" if margin else ""
    return Verdict(
        outcome_,
        f"{metric} {_spread(a)} for {ours}, {_spread(b)} for {theirs} "
        f"(gain {mean - margin:+.4g} ± {half:.2g}{allowed}).",
    )


def at_most(value: float, limit: float, what: str) -> Verdict:
    """Shown where `value` is at most `limit`, else contradicted: for counts and sizes."""
    outcome = SHOWN if value <= limit else CONTRADICTED
    return Verdict(outcome, f"{what}: {value:.4g}, claimed at most {limit:.4g}.")


def all_of(*verdicts: Verdict) -> Verdict:
    """A claim with several parts is worth its weakest part."""
    worst = max(verdicts, key=lambda v: [SHOWN, NOT_SHOWN, CONTRADICTED].index(v.outcome))
    return Verdict(worst.outcome, " ".join(f"({v.outcome}) {v.reason}" for v in verdicts))


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.4g}"
    return f"{statistics.fmean(values):.4g} ± {statistics.stdev(values):.2g}"
