"""What training an adapter cost on other tasks: its scores there beside the base's, row by row.

    change = score with the adapter - score of the base, on the same rows (paired bootstrap)

A task is forgotten where the whole interval lies on the wrong side of 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from plait.evaluation.intervals import bootstrap
from plait.evaluation.results import Evaluation, Score


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
            for metric, values in new.values.items():
                if metric in new.scores and metric in old.values:
                    found.append(_change(task, new.label, metric, old.values[metric], values))
    return found


def _change(task: str, label: str, metric: str, old: list[float], new: list[float]) -> Change:
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if not math.isnan(a + b)]
    gaps = [b - a for a, b in pairs]
    better = metric != "loss"
    mean = sum(gaps) / len(gaps)
    score = Score(metric, mean, *bootstrap(gaps), len(gaps), "bootstrap", higher_is_better=better)
    before, after = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
    return Change(task, label, metric, before, after, score)
