"""Claims of merges, judged on the one table that `python -m benchmarks.merging` makes."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[3]))
from benchmarks.merging.results import Summary, read_results

from lab.claim import Claim
from lab.verdict import (
    CONTRADICTED,
    NOT_SHOWN,
    SHOWN,
    Outcome,
    Verdict,
    all_of,
    interval,
)

Metric = Literal["held-in", "held-out", "general"]
NOTE = (
    "Eight LoRAs of rank 8 on all-MiniLM-L6-v2, one a task, merged; every method tuned with eight "
    "evaluations on validation rows; intervals are paired over tasks, with one training seed "
    "(setting and table: `benchmarks/merging/RESULTS.md`)."
)


@dataclass(frozen=True)
class Part:
    """One comparison of a claim: `ours` above `theirs`, or at most `margin` below.

    Held-in accuracies count as shares of the tasks' own experts', general ones of the base's,
    held-out ones as they are.
    """

    ours: str
    theirs: str
    metric: Metric = "held-in"
    margin: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.ours} over {self.theirs}, {self.metric}"

    def values(self, summary: Summary, label: str) -> list[float]:
        if self.metric == "held-in":
            return summary.normalised(label)
        if self.metric == "general":
            return summary.kept(label)
        return summary.accuracies(label, "held-out")

    def measured(self, summary: Summary) -> dict[str, float]:
        """The two means, the mean of the paired gain, and half its 95 % interval."""
        ours, theirs = self.values(summary, self.ours), self.values(summary, self.theirs)
        mean, half = interval([a - b for a, b in zip(ours, theirs, strict=True)])
        means = statistics.fmean(ours), statistics.fmean(theirs)
        keys = ("ours", "theirs", "gain", "half width")
        return {f"{self.name}: {k}": v for k, v in zip(keys, (*means, mean, half), strict=True)}

    def judge(self, found: Outcome) -> Verdict:
        known = found["measured"]
        ours, theirs, gain, half = (
            known[f"{self.name}: {key}"] for key in ("ours", "theirs", "gain", "half width")
        )
        low, high = gain - half + self.margin, gain + half + self.margin
        allowed = f", {self.margin:g} allowed" if self.margin else ""
        return Verdict(
            SHOWN if low > 0 else CONTRADICTED if high < 0 else NOT_SHOWN,
            f"{self.metric} {ours:.3f} for {self.ours}, {theirs:.3f} for {self.theirs} "
            f"(gain {gain:+.3f} ± {half:.3f}{allowed}).",
        )


def merge_claim(
    slug: str, paper: str, statement: str, parts: Sequence[Part], note: str = ""
) -> Claim:
    """A claim that is worth its weakest part."""

    def measure(smoke: bool) -> dict[str, Any]:
        summary = Summary.of(read_results())
        labels = {label for part in parts for label in (part.ours, part.theirs)}
        needed = sorted(labels | {"base", "own experts"})
        if not summary.complete(needed):
            missing = [label for label in needed if label not in summary.lines]
            raise SystemExit(f"{slug}: run `python -m benchmarks.merging` first, for {missing}")
        found: dict[str, Any] = {}
        for part in parts:
            found |= part.measured(summary)
        return found

    return Claim(
        slug=slug,
        paper=paper,
        statement=statement,
        measure=measure,
        judge=lambda found: all_of(*(part.judge(found) for part in parts)),
        note=f"{NOTE} {note}".strip(),
    )
