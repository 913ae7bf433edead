"""Every rule in the Trainer: where the bare loop goes, and on two processes where one goes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bare_loop import bare_loop, run, weights
from tiny_run import make_recipe, rows

import plait
from plait.testing.rules import rule_names

FULL = [("lora-pro", {"moments": "full"})]


def recipe_of(output: Path, name: str, options: dict[str, Any] | None = None, **changes: Any):
    """Eight steps under a rule, on the adapter it stands for."""
    method = plait.get_method(name)
    own = method.axis != "rule" or method.delta is not None
    carrier = name if own else "lora" if method.rule.needs_adapter else "none"
    given: dict[str, Any] = {}
    if carrier != "none":
        fields = plait.get_method(carrier).options.__dataclass_fields__
        given = {k: v for k, v in {"rank": 2, "dropout": 0.0}.items() if k in fields}
        given |= plait.get_method(carrier).example
    values = {
        "method": carrier,
        "options": given,
        "rules": [{name: method.rule_example if options is None else options}],
        "lr": 1e-3,
        "parity": False,
        **changes,
    }
    return make_recipe(output, **values)


def close(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> None:
    """Tensor by tensor within a tenth of its norm: Adam turns the rounding of a gradient that is
    next to nothing into whole steps of single entries."""
    for key, value in theirs.items():
        gap, size = (ours[key] - value).float().norm(), value.float().norm()
        assert gap <= 0.1 * size + 1e-4, f"{name}: {key} is off by {gap:.2e}, of {size:.2e}"


@pytest.mark.parametrize(("name", "options"), [*((n, None) for n in rule_names()), *FULL])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_goes_where_the_bare_loop_goes(
    tmp_path: Path, name: str, options: Any, accumulate: int
) -> None:
    recipe = recipe_of(tmp_path / "run", name, options, gradient_accumulation=accumulate)
    model, losses = bare_loop(recipe)
    result = run(recipe, eval_data=rows(6, 1))
    assert [r["loss"] for r in result.history if "loss" in r] == pytest.approx(losses, rel=1e-3)
    ours, theirs = weights(result.model), weights(model)
    assert set(ours) == set(theirs)
    close(ours, theirs, name)


SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
from bare_loop import run
from test_rules_training import recipe_of
from tiny_run import rows
import plait
from plait.testing.rules import rule_names
refused = {{}}
for name in rule_names():
    recipe = recipe_of(Path({output!r}) / name, name, batch_size=2, steps=4)
    try:
        run(recipe, eval_data=rows(6, 1))
    except plait.PlaitError as e:
        refused[name] = str(e)
Path({output!r}, "refused.json").write_text(json.dumps(refused))
"""


@pytest.mark.slow
def test_two_processes_train_what_one_does_or_refuse(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script, output = tmp_path / "run.py", tmp_path / "two"
    output.mkdir()
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), output=str(output)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--master-port", str(port), str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused = json.loads((output / "refused.json").read_text())
    for name, reason in refused.items():
        assert "processes" in reason, f"{name}: {reason}"
    same = [
        n for n in rule_names() if n not in refused and plait.get_method(n).rule().splits_batches
    ]
    assert len(same) > 4
    for name in same:
        alone = run(recipe_of(tmp_path / name, name, steps=4), eval_data=rows(6, 1))
        if alone.adapter is None:
            continue
        two = plait.read_adapter(output / name / "adapter").state_dict()
        close(two, alone.adapter.state_dict(), name)
