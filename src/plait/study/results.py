"""What a bake-off found: a row for each method, the verdict, and what was planned and spent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from plait.study.inference import Interval, Verdict, intervals, judge
from plait.study.job import Record


@dataclass(frozen=True)
class Row:
    """One method, over its finals (or, for one that is no finalist, its tuning)."""

    label: str
    method: str
    options: dict[str, Any]
    score: Interval | None
    """None for what is no finalist."""
    loss: float | None
    """Mean validation loss of the finals; of the best trial without finals."""
    lr: float | None
    rates: list[dict[str, Any]]
    """Every learning rate tried: {"lr", "loss", "state", "rungs"}."""
    seeds: list[int]
    curves: list[dict[str, Any]]
    """{"losses": by step, "seconds": since the first} of each final."""
    parameters: int | None
    bytes: int | None
    start_seconds: float | None
    step_seconds: float | None
    train_seconds: float | None
    """Median of start and steps."""
    peak_memory: int | None
    at_edge: bool = False
    """Whether the best rate is the lowest or highest tried: a wider range may hold a better one."""
    problem: str = ""


@dataclass
class Comparison:
    """The outcome; `save` and `report` are what a run leaves behind."""

    task: dict[str, Any]
    rows: list[Row]
    base_score: float | None
    verdict: Verdict | None
    """None where fewer than one method could be scored."""
    planned: dict[str, Any]
    spent: dict[str, Any]
    settings: dict[str, Any]
    advice: str = ""
    output: Path | None = None
    report: Path | None = None

    @property
    def winner(self) -> str | None:
        """The method that is significantly better than all others, or None."""
        return None if self.verdict is None else self.verdict.winner

    def __getitem__(self, label: str) -> Row:
        from plait.errors import unknown

        for row in self.rows:
            if row.label == label:
                return row
        raise unknown("method", label, [r.label for r in self.rows])

    def ranked(self) -> list[Row]:
        """Finalists from the best score down, then the others."""
        sign = -1 if self.task["higher_is_better"] else 1
        return sorted(
            self.rows,
            key=lambda r: (r.score is None, sign * r.score.mean if r.score else 0.0, r.label),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        found = dataclasses.asdict(self)
        found |= {"winner": self.winner, "output": str(self.output), "report": str(self.report)}
        return found

    def table(self) -> Any:
        """A rich table for the terminal."""
        from rich.table import Table

        metric = self.task["metric"]
        table = Table(title=f"{metric} on held-out examples, 95 % intervals", title_justify="left")
        names = ("method", metric, "against the leader", "lr", "parameters", "ms/step", "file")
        for name in names:
            table.add_column(name, justify="left" if name == "method" else "right")
        for row in self.ranked():
            table.add_row(*self._cells(row))
        return table

    def _cells(self, row: Row) -> list[str]:
        return [
            row.label,
            str(row.score) if row.score else "did not run" if row.problem else "no finalist",
            self.gap(row.label),
            "" if row.lr is None else f"{row.lr:.3g}" + (" (edge)" if row.at_edge else ""),
            "" if row.parameters is None else f"{row.parameters:,}",
            "" if row.step_seconds is None else f"{1000 * row.step_seconds:.0f}",
            "" if row.bytes is None else size(row.bytes),
        ]

    def gap(self, label: str) -> str:
        """How a method stands to the leader, in words."""
        if self.verdict is None or label not in self.verdict.means:
            return ""
        if label == self.verdict.leader:
            return "wins" if self.winner else "leads" if len(self.verdict.means) > 1 else ""
        found = self.verdict.against_leader(label)
        if found is None or math.isnan(found.interval.low):
            return "undecided"
        return "worse" if found.significant else "within noise"


def make_rows(
    contenders: Sequence[Any],
    tuned: Mapping[str, Sequence[Record]],
    finals: Mapping[str, Sequence[Record]],
    facts: Mapping[str, Mapping[str, Any]],
    problems: Mapping[str, str],
) -> list[Row]:
    """One row a contender, from its records; `facts` holds what its probe told."""
    scores = intervals({n: [r["scores"] for r in records] for n, records in finals.items()})
    return [
        _row(
            c,
            tuned.get(c.label, ()),
            finals.get(c.label, ()),
            scores.get(c.label),
            facts.get(c.label, {}),
            problems.get(c.label, ""),
        )
        for c in contenders
    ]


def _row(
    contender: Any,
    tuned: Sequence[Record],
    finals: Sequence[Record],
    score: Interval | None,
    facts: Mapping[str, Any],
    problem: str,
) -> Row:
    best = best_trial(tuned)
    shown = list(finals) or ([best] if best else [])
    rates = sorted(r["lr"] for r in tuned)
    starts, steps = (_middle(shown, key) for key in ("start_seconds", "step_seconds"))
    training = [r["start_seconds"] + r["seconds"][-1] for r in shown if r.get("seconds")]
    return Row(
        label=contender.label,
        method=contender.method,
        options=dict(contender.options),
        score=score,
        loss=_mean([r["loss"] for r in shown]),
        lr=None if best is None else best["lr"],
        rates=[_rate(r) for r in sorted(tuned, key=lambda r: r["lr"])],
        seeds=[r["seed"] for r in finals],
        curves=[{"losses": r["losses"], "seconds": r["seconds"]} for r in shown],
        parameters=_middle(shown, "parameters", facts.get("parameters")),
        bytes=_middle(finals, "bytes"),
        start_seconds=starts,
        step_seconds=steps if steps is not None else facts.get("step_seconds"),
        train_seconds=median(training) if training else None,
        peak_memory=_middle(shown, "peak_memory", facts.get("peak_memory")),
        at_edge=best is not None and len(rates) > 2 and best["lr"] in (rates[0], rates[-1]),
        problem=problem,
    )


def best_trial(tuned: Sequence[Record]) -> Record | None:
    """The finished trial of least validation loss."""
    done = [r for r in tuned if r["state"] == "done"]
    return min(done, key=lambda r: (r["loss"], r["lr"])) if done else None


def verdict_of(finals: Mapping[str, Sequence[Record]], higher_is_better: bool) -> Verdict | None:
    """The verdict over seeds that all finalists have."""
    if not finals:
        return None
    shared = set.intersection(*({r["seed"] for r in records} for records in finals.values()))
    if not shared:
        return None
    tables = {
        label: [
            r["scores"] for r in sorted(records, key=lambda r: r["seed"]) if r["seed"] in shared
        ]
        for label, records in finals.items()
    }
    return judge(tables, higher_is_better)


def _rate(record: Record) -> dict[str, Any]:
    return {k: record.get(k) for k in ("lr", "loss", "state", "rungs", "reason") if k in record}


def _middle(records: Sequence[Record], key: str, otherwise: Any = None) -> Any:
    values = [r[key] for r in records if r.get(key) is not None]
    if not values:
        return otherwise
    middle = median(values)
    return round(middle) if isinstance(values[0], int) else middle


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
