"""Resuming: the same command goes on from the newest complete checkpoint to the same loss curve."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_run import make_base, make_recipe, make_tokenizer, rows

import plait
from plait.errors import PlaitError
from plait.rules._base_weights import base_parameters
from plait.training import checkpoint
from plait.training.callbacks import Monitor
from plait.training.report import read_log
from plait.training.trainer import train


def run(recipe, **more):
    given = {"model": make_base(), "tokenizer": make_tokenizer(), "data": rows(), "quiet": True}
    return train(recipe, **{**given, **more})


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C in the middle of step `step` + 1."""
    real = Monitor.on_step_end

    def on_step_end(self, args, state, control, **more):
        real(self, args, state, control, **more)
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Monitor, "on_step_end", on_step_end)


def weights(result) -> dict[str, torch.Tensor]:
    if result.adapter is not None:
        return result.adapter.state_dict()
    return dict(base_parameters(result.model))


def losses(folder: Path) -> dict[int, float]:
    records = [r for r in read_log(folder / "log.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))  # none twice
    return {r["step"]: r["loss"] for r in records}


GROWTH = {"target_rank": 2, "warmup": 2, "interval": 2, "top_h": 8}
RUNS = {
    "lora with dropout": {},
    "accumulation": {"gradient_accumulation": 2, "batch_size": 2},
    "packing": {"packing": True, "batch_size": 2},
    "increlora": {
        "method": "increlora",
        "options": {"reserve": 1},
        "rules": [{"increlora": GROWTH}],
    },
    "lora-pro": {"rules": [{"lora-pro": {"moments": "full"}}], "lr": 1e-3},
    "lisa": {
        "method": "none",
        "options": {},
        "rules": [{"lisa": {"blocks": 1, "interval": 2}}],
        "lr": 1e-3,
    },
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("at", [5, 7])
def test_an_interrupted_run_goes_on_to_the_same_curve_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int
) -> None:
    # 24 rows of 4 are six steps an epoch: 5 resumes from 3, within one, and 7 from 6, between two.
    changes = {"steps": 10, "parity": False, **RUNS[name]}
    whole = run(make_recipe(tmp_path / "whole", **changes))
    with monkeypatch.context() as patch:
        interrupt_at(patch, at)
        with pytest.raises(KeyboardInterrupt):
            run(make_recipe(tmp_path / "cut", **changes))
    assert checkpoint.step_of(checkpoint.checkpoints(tmp_path / "cut")[-1]) == at // 3 * 3
    torch.manual_seed(99)  # whatever state the new process is in
    resumed = run(make_recipe(tmp_path / "cut", **changes))
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    ours, theirs = weights(resumed), weights(whole)
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=1e-6, rtol=1e-4)


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first = run(make_recipe(tmp_path), eval_data=rows(5, 3))
    log = (tmp_path / "log.jsonl").read_text()
    again = run(make_recipe(tmp_path), eval_data=rows(5, 3))
    assert (tmp_path / "log.jsonl").read_text() == log
    assert again.steps == first.steps and again.eval_loss == first.eval_loss
    for key, value in first.adapter.state_dict().items():
        assert torch.equal(again.adapter.state_dict()[key], value)


def test_a_run_killed_between_the_last_checkpoint_and_the_end_is_finished(tmp_path: Path) -> None:
    changes = {"method": "increlora", "options": {"reserve": 1}, "steps": 4, "parity": False}
    changes["rules"] = [{"increlora": {**GROWTH, "warmup": 3, "interval": 3, "finish_by": 99}}]
    whole = run(make_recipe(tmp_path, **changes))
    (tmp_path / "adapter" / "plait.json").unlink()
    again = run(make_recipe(tmp_path, **changes))
    # The checkpoint still has the reserve; finishing the rules drops it.
    assert all(d.reserve == 0 for d in again.adapter.deltas.values())
    for key, value in whole.adapter.state_dict().items():
        assert torch.equal(again.adapter.state_dict()[key], value)


def test_more_steps_go_on_from_where_the_run_ended(tmp_path: Path) -> None:
    run(make_recipe(tmp_path, steps=4))
    longer = run(make_recipe(tmp_path, steps=7))
    assert longer.steps == 7 and len(losses(tmp_path)) == 7


def test_half_written_checkpoints_are_never_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run(make_recipe(tmp_path))
    half = tmp_path / ".checkpoint-4.tmp"
    half.mkdir()
    (half / "optimizer.pt").write_bytes(b"half")
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"step": 6, "loss"')
    result = run(make_recipe(tmp_path))
    assert result.steps == 8 and not half.exists() and len(losses(tmp_path)) == 8


def test_a_crash_while_saving_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.save

    def save(value, file, *more, **options):
        if str(file).endswith("rules.pt") and ".checkpoint-6." in str(file):
            raise OSError("no space left")
        return real(value, file, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(OSError, match="no space"):
            run(make_recipe(tmp_path))
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-3"]
    assert not list(tmp_path.glob(".checkpoint*"))
    assert run(make_recipe(tmp_path)).steps == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.02}, "another lr"),
        ({"options": {"rank": 3}}, "another options"),
        ({"seed": 1}, "another seed"),
        ({"rules": ["lora-plus"]}, "another rules"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(
    tmp_path: Path, changes: dict, message: str
) -> None:
    run(make_recipe(tmp_path, steps=2, parity=False))
    with pytest.raises(PlaitError, match=message):
        run(make_recipe(tmp_path, **{"steps": 2, "parity": False, **changes}))


def test_other_data_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run(make_recipe(tmp_path, steps=2, parity=False))
    with pytest.raises(PlaitError, match="other data"):
        run(make_recipe(tmp_path, steps=4, parity=False), data=rows(25))


def test_starting_anew_forgets_the_old_run(tmp_path: Path) -> None:
    run(make_recipe(tmp_path, steps=6, parity=False))
    fresh = run(make_recipe(tmp_path, steps=3, lr=0.02, parity=False), resume=False)
    assert fresh.steps == 3 and len(losses(tmp_path)) == 3
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-3"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(make_recipe(tmp_path, save_every=1, keep_checkpoints=3, parity=False))
    names = [p.name for p in checkpoint.checkpoints(tmp_path)]
    assert names == ["checkpoint-6", "checkpoint-7", "checkpoint-8"]


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
from tiny_run import make_base, make_recipe, make_tokenizer, rows
from plait.training.trainer import train
recipe = make_recipe(Path({output!r}), steps=4000, save_every=2, parity=False)
train(recipe, model=make_base(), tokenizer=make_tokenizer(), data=rows(), quiet=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_at_most_the_steps_since_a_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "run"
    script = SCRIPT.format(tests=str(Path(__file__).parent), output=str(output))
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ})
    try:
        deadline = time.monotonic() + 120
        while len(losses(output)) < 9:  # checkpoints are being written all the time by now
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    logged = max(losses(output))
    newest = checkpoint.checkpoints(output)[-1]
    assert checkpoint.step_of(newest) >= logged - 2
    adapter = plait.read_adapter(newest / checkpoint.ADAPTER)
    adapter.check()
    assert json.loads((newest / "trainer_state.json").read_text())["global_step"] > 0
    goal = checkpoint.step_of(newest) + 5
    changes = {"steps": goal, "save_every": 2, "parity": False}
    resumed = run(make_recipe(output, **changes))
    assert resumed.steps == goal and len(losses(output)) == goal
