"""`plait compare`: from a recipe, or a task of one's own, to a report and how to go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plait.cli.compare import read_task

TOY = Path(__file__).parent.parent / "study" / "toy_tasks.py"
FEW = ("--grid", "--trials", 1, "--seeds", 2, "--steps", 3)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.study import report

    monkeypatch.setattr(report, "_picture", lambda *_: [])


def recipe(folder: Path, base: Path) -> Path:
    rows = [{"prompt": f"question {i}", "completion": "yes"} for i in range(30)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "recipe.yaml"
    file.write_text(f"base: {base}\ndata: {folder / 'train.jsonl'}\nrank: 2\nmax_length: 64\n")
    return file


def test_a_recipe_is_compared(run, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--methods", "lora,dora", "--test-rows", 4, "--validation-rows", 2, "-o", out)
    code, shown, err = run("compare", recipe(tmp_path, base), "batch_size=2", *words, *FEW)
    assert code == 0, err
    assert "against the leader" in shown
    found = json.loads((out / "comparison.json").read_text())
    assert found["task"]["test_examples"] == 4 and found["advice"] in shown
    assert {row["label"] for row in found["rows"]} == {"lora", "dora"}
    assert (out / "report.html").is_file() and "report.html" in err
    code, again, err = run("compare", recipe(tmp_path, base), "batch_size=2", *words, *FEW)
    assert code == 0 and err.count("done before") >= 7 and again == shown


def test_a_task_of_ones_own_by_word_or_in_yaml(run, tmp_path: Path) -> None:
    out = tmp_path / "a"
    code, shown, err = run("compare", f"{TOY}:WINNER", "-m", "lora", "-o", out, *FEW)
    assert code == 0, err
    assert "Only lora was scored" in shown
    file = tmp_path / "task.yaml"
    file.write_text(f"task: {TOY}:OneMustWin\nbatch_size: 8\n")
    task = read_task([str(file), "clip=0.5"], {})
    assert (task.recipe.batch_size, task.recipe.clip, task.recipe.steps) == (8, 0.5, 40)


def test_ctrl_c_says_how_to_go_on(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.study.bench import Bench

    def interrupted(self, job):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "run", interrupted)
    monkeypatch.setattr("sys.argv", ["plait", "compare", "my task.yaml", "--restart"])
    code, _, err = run("compare", f"{TOY}:WINNER", "-m", "lora", "-o", tmp_path, *FEW)
    assert code == 130
    assert "Go on with\n  plait compare 'my task.yaml'\n" in err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("-m", "loar"), "did you mean 'lora'"),
        (("-m", "lora", "--lr", "fast"), "LOW:HIGH"),
        (("-m", "lora", "--parameters", "many"), "auto, default, or a number"),
        (("-m", "lora", "--budget", "soon"), "30m"),
        (("-m", "lora", "--equal", "luck"), "'steps' or 'time'"),
    ],
)
def test_mistakes_are_said_before_anything_runs(run, tmp_path: Path, words, reason: str) -> None:
    code, _, err = run("compare", f"{TOY}:WINNER", *words, "-o", tmp_path)
    assert code == 2 and reason in err
    assert not list(tmp_path.iterdir())
