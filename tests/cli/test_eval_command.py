"""`plait eval` with a mixed pass, other tasks, chains of thought and a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{i}?", "choices": ["yes", "no"], "answer": i % 2} for i in range(6)]
    file = tmp_path / "quiz.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_report_of_several_adapters(
    run, adapters, base: Path, quiz: Path, tmp_path: Path
) -> None:
    steps = tmp_path / "steps.jsonl"
    steps.write_text(json.dumps({"question": "q?", "steps": ["a", "b"], "choices": ["x", "y"]}))
    words = ["eval", "--base", base, "--data", quiz, "--metric", "calibration", "--mixed"]
    words += ["--adapter", adapters["sql"], "--adapter", adapters["chat"]]
    words += ["--keep", f"facts={quiz}", "--reasoning", steps, "--report", tmp_path / "out"]
    code, out, err = run(*words)
    assert code == 0, err
    assert "ece" in out and f"facts, {adapters['sql']}: choice" in out
    assert f"chain of thought, {adapters['chat']}: early" in out
    assert err.count("wrote ") == 5  # the page, the numbers, a diagram an adapter and the base's
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(facts["results"]) == 3 and facts["settings"]["mixed"] is True
    alone = json.loads(run(*words[:7], *words[8:12], "--json")[1])
    for one, other in zip(alone["results"], facts["results"], strict=True):
        assert one["values"]["confidence"] == pytest.approx(other["values"]["confidence"], abs=1e-5)


def test_a_row_without_steps_is_named(run, base: Path, quiz: Path) -> None:
    code, _, err = run("eval", "--base", base, "--data", quiz, "--reasoning", quiz)
    assert code == 2 and "quiz.jsonl:1: a question" in err
