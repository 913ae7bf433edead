"""The page of the bake-offs says what the stored outcomes say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.which_method.page import RESULTS, mean_ranks, write_page

ROOT = Path(__file__).parents[2]


def outcome(name: str, scores: dict[str, float | None], tied: list[str]) -> dict[str, Any]:
    rows = [
        {
            "label": label,
            "score": None if score is None else [score, score - 0.1, score + 0.1],
            "behind": None,
            "gap": "leads" if label in tied else "worse",
            "lr": 1e-3,
            "parameters": 1000,
            "bytes": 4000,
            "step_seconds": 0.01,
            "at_edge": False,
            "problem": "" if score is not None else "it diverged",
        }
        for label, score in scores.items()
    ]
    return {
        "task": {"name": name, "title": name, "metric": "accuracy", "test_examples": 9},
        "rows": rows,
        "base": 0.1,
        "advice": "Take it.",
        "date": "2026-01-01",
        "machine": "here",
        "plan": {"steps": {"a": 5}, "trials": 2, "seeds": 3, "budget": 600, "seconds": 540.0},
        "winner": None,
        "tied": tied,
    }


def test_ranks_of_those_within_noise_are_shared() -> None:
    one = outcome("one", {"a": 0.9, "b": 0.8, "c": 0.5, "d": None}, ["a", "b"])
    two = outcome("two", {"c": 0.9, "b": 0.5, "a": 0.4, "d": 0.1}, ["c"])
    assert mean_ranks([one, two]) == {"a": (1.5 + 3) / 2, "b": (1.5 + 2) / 2, "c": 2.0}


def test_a_page_of_outcomes(tmp_path: Path) -> None:
    found = outcome("one", {"a": 0.9, "lora": 0.8, "d": None}, ["a"])
    (tmp_path / "one.json").write_text(json.dumps(found))
    text = write_page(tmp_path, tmp_path / "docs").read_text()
    assert "| `a` | 0.900 [0.800, 1.000] | leads |" in text and "`d` | it diverged" in text
    assert "Took 9.0 minutes of a budget of 10." in text
    assert (tmp_path / "docs" / "which-method.png").stat().st_size > 1000


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no bake-off is stored")
def test_the_page_in_docs_is_of_the_stored_outcomes(tmp_path: Path) -> None:
    made = write_page(RESULTS, tmp_path).read_text(encoding="utf-8")
    assert made == (ROOT / "docs" / "which-method.md").read_text(encoding="utf-8")
