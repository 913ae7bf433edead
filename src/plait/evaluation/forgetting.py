"""What training an adapter cost on other tasks: its scores there beside the base's, row by row.

    change = score with the adapter - score of the base, on the same rows (paired bootstrap)

A task is forgotten where the whole interval lies on the wrong side of 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from plait.evaluation.intervals import bootstrap
from plait.evaluation.results import Evaluation, Result, Score


@dataclass(frozen=True)
class Change:
    """One adapter's change of one metric on one task; `score` is the difference."""

    task: str
    label: str
    metric: str
    before: float
    after: float
    score: Score

    @property
    def worse(self) -> bool:
        """Whether it is worse than before, beyond chance at 95 %."""
        return self.score.high < 0 if self.score.higher_is_better else self.score.low > 0


def forgetting(tasks: dict[str, Evaluation], before: str = "base") -> list[Change]:
    """The changes of every other result against `before`, by task and metric with numbers by row.

    UnknownNameError where a task has no result of that label.
    """
    found = []
    for task, evaluation in tasks.items():
        old = evaluation[before]
        for new in evaluation.results:
            if new is old:
                continue
            for metric in new.values:
                if metric in new.scores and metric in old.values:
                    found.append(_change(task, metric, old, new))
    return found


def _change(task: str, metric: str, old: Result, new: Result) -> Change:
    """A loss is a mean over tokens, as its score is: long answers count for more."""
    better, known = metric != "loss", new.values[metric]
    weights = [1.0] * len(known) if better else new.values.get("tokens", [1.0] * len(known))
    rows = zip(old.values[metric], known, weights, strict=True)
    kept = [(a * w, b * w, w) for a, b, w in rows if not math.isnan(a + b)]
    total = sum(w for _, _, w in kept)
    before, after = (sum(row[side] for row in kept) / total for side in (0, 1))
    gaps, weights = [b - a for a, b, _ in kept], [w for _, _, w in kept]
    interval = bootstrap(gaps, weights)
    facts: dict[str, Any] = {"interval": "bootstrap", "higher_is_better": better}
    score = Score(metric, after - before, *interval, len(kept), **facts)
    return Change(task, new.label, metric, before, after, score)
