"""The lines of results: benchmarks/results/merging.jsonl, one a contender and number of experts.

The last good line of each counts; a line with an error is tried again. `Summary` is what tables and
verdicts are made of.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "results" / "merging.jsonl"
Key = tuple[str, int]


def read_results(file: Path = FILE) -> dict[Key, dict[str, Any]]:
    """{(label, number of experts): its last good line}."""
    lines = file.read_text().splitlines() if file.is_file() else []
    found = [json.loads(line) for line in lines if line.strip()]
    return {(line["label"], line["experts"]): line for line in found if "error" not in line}


def append(line: Mapping[str, Any], file: Path = FILE) -> None:
    """One more line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Summary:
    """All lines of one number of experts, with the references they are compared to."""

    lines: Mapping[str, dict[str, Any]]
    kinds: Mapping[str, str]

    @classmethod
    def of(cls, found: Mapping[Key, dict[str, Any]], experts: int = 8) -> Summary:
        lines = {label: line for (label, count), line in found.items() if count == experts}
        kinds: dict[str, str] = {}
        for line in lines.values():
            kinds |= line.get("kinds", {})
        return cls(lines, kinds)

    def tasks(self, kind: str) -> list[str]:
        return [name for name, each in self.kinds.items() if each == kind]

    def accuracies(self, label: str, kind: str) -> list[float]:
        """Task by task, in the order of `tasks`."""
        found = self.lines[label]["tasks"]
        return [found[name]["accuracy"] for name in self.tasks(kind)]

    def normalised(self, label: str) -> list[float]:
        """Held-in accuracies over those of the tasks' own experts."""
        own = self.accuracies("own experts", "held-in")
        return [a / b for a, b in zip(self.accuracies(label, "held-in"), own, strict=True)]

    def held_in(self, label: str) -> float:
        return statistics.fmean(self.normalised(label))

    def recovered(self, label: str) -> float:
        """The share of the way from the base to the experts."""
        means = [
            statistics.fmean(self.accuracies(name, "held-in"))
            for name in (label, "base", "own experts")
        ]
        return (means[0] - means[1]) / (means[2] - means[1])

    def gains(self, label: str, other: str, kind: str) -> list[float]:
        """Accuracy gained over another contender, task by task."""
        pairs = zip(self.accuracies(label, kind), self.accuracies(other, kind), strict=True)
        return [a - b for a, b in pairs]

    def kept(self, label: str) -> list[float]:
        """Accuracies on general tasks over the base's: 1 is nothing forgotten."""
        base = self.accuracies("base", "general")
        return [a / b for a, b in zip(self.accuracies(label, "general"), base, strict=True)]

    def complete(self, labels: Sequence[str]) -> bool:
        return all(label in self.lines for label in labels)
