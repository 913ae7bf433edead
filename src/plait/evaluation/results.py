"""What an evaluation found: scores with their intervals, as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.adapter.formats.atomic import text_writer, write_file


@dataclass(frozen=True)
class Score:
    """One number and its 95 % interval. `count` is over how many examples (or, for a loss, `tokens`
    of them too); `interval` names how the bounds were found."""

    metric: str
    value: float
    low: float
    high: float
    count: int
    interval: str
    tokens: int | None = None
    higher_is_better: bool = True

    def __str__(self) -> str:
        if self.interval == "wilson":
            return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass
class Result:
    """The scores of one adapter (or mix of them); `active` is {adapter: weight}, {} the base."""

    label: str
    active: dict[str, float]
    scores: dict[str, Score]
    seconds: float
    predictions: list[str] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    """By metric, the number of every example (of a choice also the `confidence`)."""


@dataclass
class Evaluation:
    """Several results over the same examples."""

    results: list[Result]
    examples: int
    settings: dict[str, Any]
    questions: list[dict[str, str]] = field(default_factory=list)
    """What was asked and wanted ("question", "answer"), row by row as the predictions are."""

    def __getitem__(self, label: str) -> Result:
        from plait.errors import unknown

        for result in self.results:
            if result.label == label:
                return result
        raise unknown("result", label, [r.label for r in self.results])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what is not finite (a perplexity that overflowed) is None."""
        return finite(dataclasses.asdict(self))

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON; the folder is made where it is missing."""
        return write_file(Path(path), text_writer(self.to_json() + "\n"))

    def table(self) -> Any:
        """A rich table: one row an adapter, one column a metric."""
        from rich.table import Table

        metrics = list(dict.fromkeys(m for r in self.results for m in r.scores))
        table = Table(title=f"{self.examples} examples, 95 % intervals", title_justify="left")
        table.add_column("adapter")
        for metric in metrics:
            table.add_column(metric.replace("_", " "), justify="right")
        table.add_column("seconds", justify="right")
        for result in self.results:
            cells = [str(result.scores[m]) if m in result.scores else "" for m in metrics]
            table.add_row(result.label, *cells, f"{result.seconds:.1f}")
        return table


def finite(value: Any) -> Any:
    """Plain data with None for every number that JSON does not know."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
