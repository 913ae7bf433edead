"""Two processes under torchrun train what one process trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import make_base, make_recipe, make_tokenizer, rows

import plait
from plait.training.report import read_log
from plait.training.trainer import train

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
from tiny_run import make_base, make_recipe, make_tokenizer, rows
from plait.training.trainer import train
changes = dict({changes!r}, batch_size=2)
given = dict(model=make_base(), tokenizer=make_tokenizer(), data=rows(), eval_data=rows(7, 1))
train(make_recipe(Path({output!r}), **changes), quiet=True, **given)
"""


def torchrun(script: Path) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(port), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_resume(tmp_path: Path) -> None:
    changes = {"steps": 6, "options": {"rank": 2}, "rules": ["lora-plus"], "parity": False}
    changes |= {"scheduler": "constant", "lr": 1e-3}  # of 4 steps as of 6
    alone = make_recipe(tmp_path / "one", **changes)
    given = {"model": make_base(), "tokenizer": make_tokenizer(), "data": rows(), "quiet": True}
    one = train(alone, eval_data=rows(7, 1), **given)

    script, output = tmp_path / "run.py", tmp_path / "two"
    for steps in (4, 6):  # the second call resumes, on both processes
        text = {"tests": str(Path(__file__).parent), "output": str(output)}
        script.write_text(SCRIPT.format(changes={**changes, "steps": steps}, **text))
        done = torchrun(script)
        assert done.returncode == 0, done.stderr[-2000:]
    log = read_log(output / "log.jsonl")
    assert [r["step"] for r in log if "loss" in r] == list(range(1, 7))
    assert json.loads((output / "data.json").read_text())["rows"] == 24
    assert {p.name for p in output.glob("checkpoint-6/rng_state_*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    two = plait.read_adapter(output / "adapter")
    assert log[-1]["eval_loss"] == pytest.approx(one.eval_loss, rel=1e-4)
    for name, value in one.adapter.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, atol=1e-4, rtol=1e-2)
