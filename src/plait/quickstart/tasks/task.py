"""What a demonstration task is: rows made on the spot, and a judge for answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task that can be generated, trained on and scored.

    `generate(seed)` gives train and test rows, `score(prediction, row)` says whether the generated
    text answers the row, `max_new_tokens` is enough for every right answer. A row is
    `{"messages": [system, user, assistant]}`; the last message is the reference.
    """

    name: str
    title: str
    language: str
    metric: str
    max_new_tokens: int
    generate: Callable[[int], tuple[list[Row], list[Row]]]
    score: Callable[[str, Mapping[str, Any]], bool]

    def make(self, directory: str | Path, seed: int = 0) -> tuple[Path, Path]:
        """Writes train.jsonl and test.jsonl into `directory` and returns their paths.

        The same seed and package versions give the same bytes.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        train, test = self.generate(seed)
        paths = folder / "train.jsonl", folder / "test.jsonl"
        for path, rows in zip(paths, (train, test), strict=True):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path.write_text("".join(lines), encoding="utf-8", newline="\n")
        return paths


def row(system: str, question: str, answer: str) -> Row:
    """A row; `system` is there because many templates put in a long default one where it is not."""
    turns = (("system", system), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def prompt(row: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    """The messages before the answer: what the model is asked."""
    return row["messages"][:-1]


def reference(row: Mapping[str, Any]) -> str:
    """The expected answer."""
    return row["messages"][-1]["content"]
