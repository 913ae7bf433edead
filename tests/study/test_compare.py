"""The bake-off on planted truths, through the real engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy_tasks import AllAlike, OneMustWin, Toy

from plait.errors import PlaitError
from plait.study import Comparison, Task, compare
from plait.study.comparing import Event

FAIR = {"grid": True, "trials": 3, "seeds": 3, "lr": (1e-3, 1e-1)}


def hold(task: Task, methods: str, output: Path, **options: object) -> Comparison:
    return compare(task, methods, output=output, **{**FAIR, **options})  # type: ignore[arg-type]


def test_the_method_that_must_win_wins(tmp_path: Path) -> None:
    found = hold(OneMustWin(), "ia3,lora,dora", tmp_path)
    assert found.verdict is not None
    assert "ia3" not in found.verdict.tied and {"lora", "dora"} >= set(found.verdict.tied)
    alone = hold(OneMustWin(), "ia3,lora", tmp_path / "two")
    assert alone.winner == "lora" and alone.advice.startswith("Take lora")
    assert alone.gap("ia3") == "worse" and alone.gap("lora") == "wins"


def test_where_nothing_can_be_learned_nobody_wins(tmp_path: Path) -> None:
    found = hold(AllAlike(), "lora,dora,ia3", tmp_path, trials=2)
    assert found.winner is None and found.verdict is not None
    assert set(found.verdict.tied) == {"lora", "dora", "ia3"}
    assert "within noise" in found.advice and "Take lora:" not in found.advice
    assert "winner" not in (tmp_path / "report.html").read_text().replace("no winner", "")


def test_everything_is_shared_but_the_method(tmp_path: Path) -> None:
    found = hold(OneMustWin(), "lora,dora,lora-plus", tmp_path)
    records = trials(tmp_path)
    for kind in ("tune", "final"):
        seeds = {
            l: {r["seed"] for r in records if r["label"] == l and r["kind"] == kind}
            for l in ("lora", "dora", "lora-plus")
        }
        assert len({frozenset(s) for s in seeds.values()}) == 1
    assert {r["steps"] for r in records if r["kind"] in ("tune", "final")} == {40}
    rates = {row.label: [r["lr"] for r in row.rates] for row in found.rows}
    assert len({tuple(r) for r in rates.values()}) == 1  # the same grid for all
    tuned = {r["seed"] for r in records if r["kind"] == "tune"}
    judged = {r["seed"] for r in records if r["kind"] == "final"}
    assert not tuned & judged  # what chose the learning rate is not judged by


def trials(folder: Path) -> list[dict]:
    return [json.loads(f.read_text()) for f in sorted((folder / "trials").glob("*.json"))]


def test_one_base_serves_all_trials(tmp_path: Path) -> None:
    Toy.loads = OneMustWin.loads = 0
    hold(OneMustWin(), "lora,pissa,hra", tmp_path)
    assert OneMustWin.loads == 1


def test_a_base_that_was_trained_is_loaded_anew(tmp_path: Path) -> None:
    OneMustWin.loads = 0
    found = hold(OneMustWin(), "none,lora", tmp_path, trials=1, seeds=2)
    assert OneMustWin.loads > 1
    alone = hold(OneMustWin(), "lora", tmp_path / "alone", trials=1, seeds=2)
    assert found["lora"].score == alone["lora"].score  # full training before it left no trace


class Interrupt:
    """Ctrl-C after so many events."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, event: Event) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_bake_off_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = hold(OneMustWin(), "lora,ia3", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        hold(OneMustWin(), "lora,ia3", tmp_path / "cut", progress=Interrupt(9))
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "cut" / "trials").glob("*.json")}
    assert 3 <= len(before) < len(trials(tmp_path / "whole"))
    again = hold(OneMustWin(), "lora,ia3", tmp_path / "cut")
    assert all(f.stat().st_mtime_ns == t for f, t in before.items())  # nothing ran twice
    assert len(trials(tmp_path / "cut")) == len(trials(tmp_path / "whole"))
    assert [r.score for r in again.ranked()] == [r.score for r in whole.ranked()]
    assert again.advice.split(".")[0] == whole.advice.split(".")[0]


def test_optuna_and_pruning_replay_after_an_interruption(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    wanted = {"grid": False, "trials": 6, "seeds": 2}
    whole = hold(OneMustWin(), "lora,ia3", tmp_path / "whole", **wanted)
    states = [r["state"] for r in trials(tmp_path / "whole") if r["kind"] == "tune"]
    assert states.count("pruned") >= 2 and len(states) == 12
    with pytest.raises(KeyboardInterrupt):
        hold(OneMustWin(), "lora,ia3", tmp_path / "cut", progress=Interrupt(13), **wanted)
    again = hold(OneMustWin(), "lora,ia3", tmp_path / "cut", **wanted)
    assert [r.rates for r in again.rows] == [r.rates for r in whole.rows]
    assert [r.score for r in again.rows] == [r.score for r in whole.rows]


def test_what_was_finished_counts_however_late_it_is_by_now(tmp_path: Path) -> None:
    """Killed in its finals, a bake-off has less time left than its rounds of tuning would leave."""
    given = {"budget": 120, "seeds": 3, "trials": 3}
    whole = hold(OneMustWin(), "lora,ia3", tmp_path / "a", **given)
    plan, (final,) = (
        tmp_path / "a" / "plan.json",
        [f for f in (tmp_path / "a" / "trials").glob("final-*") if _is(f, "ia3", 3)],
    )
    final.unlink()  # the trial that was running
    stored = json.loads(plan.read_text())
    late = 120 - stored["plan"]["final_seconds"] / 2 - 4
    plan.write_text(json.dumps(stored | {"spent": late}))
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "a" / "trials").glob("*.json")}
    again = hold(OneMustWin(), "lora,ia3", tmp_path / "a", **given)
    assert all(f.stat().st_mtime_ns == t for f, t in before.items())
    assert len(trials(tmp_path / "a")) - len(before) <= 1
    assert [r.rates for r in again.rows] == [r.rates for r in whole.rows]
    assert again["lora"].seeds[:2] == whole["lora"].seeds[:2]


def test_to_show_a_finished_one_again_takes_nothing_of_its_budget(tmp_path: Path) -> None:
    whole = hold(OneMustWin(), "lora,ia3", tmp_path, budget=120)
    again = hold(OneMustWin(), "lora,ia3", tmp_path, budget=120)
    assert again.spent["seconds"] == pytest.approx(whole.spent["seconds"], abs=1.5)
    assert [r.score for r in again.rows] == [r.score for r in whole.rows]


def _is(file: Path, label: str, seed: int) -> bool:
    record = json.loads(file.read_text())
    return (record["label"], record["seed"]) == (label, seed)


def test_another_bake_off_in_the_folder_is_refused(tmp_path: Path) -> None:
    hold(OneMustWin(), "lora", tmp_path, trials=1, seeds=2)
    with pytest.raises(PlaitError, match="another methods"):
        hold(OneMustWin(), "lora,ia3", tmp_path, trials=1, seeds=2)
    hold(OneMustWin(), "lora,ia3", tmp_path, trials=1, seeds=2, restart=True)
    assert {r["label"] for r in trials(tmp_path)} == {"base", "lora", "ia3"}


def test_what_cannot_run_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    class Broken(OneMustWin):
        def loss(self, model, batch):
            from plait.adapter.state import find_state

            if find_state(model).adapters["default"].method.name == "dora":
                raise RuntimeError("no dora here")
            return super().loss(model, batch)

    found = hold(Broken(), "lora,dora", tmp_path, trials=1, seeds=2)
    assert "no dora here" in found["dora"].problem and found["lora"].score is not None
    assert "Did not run: dora;" in found.advice


def test_rates_that_diverge_lose_and_do_not_end_it(tmp_path: Path) -> None:
    class Steep(OneMustWin):
        def loss(self, model, batch):
            return (
                super().loss(model, batch) * 1e8 if diverges(model) else super().loss(model, batch)
            )

    def diverges(model: torch.nn.Module) -> bool:
        return any(p.abs().max() > 30 for p in model.parameters())

    found = hold(Steep(), "lora", tmp_path, lr=(1e-3, 1e7), trials=3, seeds=2)
    states = {r["lr"]: r["state"] for r in found["lora"].rates}
    assert found["lora"].lr == min(states) and found["lora"].score is not None
    assert states[min(states)] == "done" and len(states) == 3


def test_the_scores_of_the_report_are_those_of_the_adapters_it_keeps(tmp_path: Path) -> None:
    import plait

    task = OneMustWin()
    found = hold(task, "lora", tmp_path, trials=1, seeds=2)
    means = []
    for seed in (1, 2):
        model = task.load()
        plait.load(model, tmp_path / "adapters" / f"lora-seed{seed}")
        with torch.no_grad():
            means.append(sum(task.scores(model)) / 60)
    assert found["lora"].score is not None
    assert found["lora"].score.mean == pytest.approx(sum(means) / 2, abs=1e-5)


@pytest.mark.slow
def test_processes_change_nothing_but_the_time(tmp_path: Path) -> None:
    alone = hold(OneMustWin(), "lora,ia3", tmp_path / "one", trials=2, seeds=2)
    several = hold(OneMustWin(), "lora,ia3", tmp_path / "two", trials=2, seeds=2, processes=2)
    for one, other in zip(alone.rows, several.rows, strict=True):
        assert one.lr == other.lr and one.score is not None and other.score is not None
        assert one.score.mean == pytest.approx(other.score.mean, rel=1e-4)


@pytest.mark.slow
def test_ray_changes_nothing_but_the_place(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    alone = hold(OneMustWin(), "lora,ia3", tmp_path / "one", trials=1, seeds=2)
    spread = hold(OneMustWin(), "lora,ia3", tmp_path / "ray", trials=1, seeds=2, ray=True)
    for one, other in zip(alone.rows, spread.rows, strict=True):
        assert one.score is not None and other.score is not None
        assert one.score.mean == pytest.approx(other.score.mean, rel=1e-4)


def test_without_ray_the_error_names_the_extra(tmp_path: Path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PlaitError, match=r"plait\[ray\]"):
        hold(OneMustWin(), "lora", tmp_path, ray=True)
