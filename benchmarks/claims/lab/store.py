"""Trials that were run, one JSON file each: a killed run goes on, and claims share baselines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1]
TRIALS = FOLDER / "trials"
RESULTS = FOLDER / "results"


def remembered(key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The stored outcome of trial `key`, or what `work()` now finds."""
    file = TRIALS / f"{key}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    found = work()
    write(file, found)
    return found


def write(file: Path, found: dict[str, Any]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)
