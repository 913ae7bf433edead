"""The rows of every task, in a form that training and evaluation both read, and their splits.

    {"prompt": "2 + 2 =", "completion": "4", "choices": ["3", "4"], "answer": "4"}

Tasks without options leave `choices` and `answer` out; plain text is {"text": "..."}. A row may
carry more keys (`image`, `language`, ...), which readers of the form leave alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def choice(prompt: str, choices: Sequence[str], answer: str, **more: Any) -> Row:
    """A row that asks for one of several options."""
    if answer not in choices:
        raise ValueError(f"answer {answer!r} is none of the choices {list(choices)}")
    return {
        "prompt": prompt,
        "completion": answer,
        "choices": list(choices),
        "answer": answer,
        **more,
    }


def split(
    rows: Iterable[Row], seed: int = 0, validation: float = 0.15, test: float = 0.25
) -> dict[str, list[Row]]:
    """{"train", "validation", "test"}: where a row goes depends on the seed and its prompt alone.

    So rows asked twice stand on one side, and rows added later move none of the others. Each part
    is in an order drawn by the same seed.
    """
    found: dict[str, list[tuple[float, Row]]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        asked = str(row.get("prompt", row.get("text")))
        place = _place(f"{seed} {asked}")
        part = "test" if place < test else "validation" if place < test + validation else "train"
        found[part].append((_place(f"order {seed} {asked}"), row))
    return {
        part: [row for _, row in sorted(here, key=lambda pair: pair[0])]
        for part, here in found.items()
    }


def write_jsonl(file: Path, rows: Iterable[Row]) -> None:
    """Rows for `plait train` and `plait eval`."""
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _place(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
