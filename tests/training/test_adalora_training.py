"""AdaLoRA through the Trainer: pruned ranks in the checkpoints, and resuming around the pruning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_run import make_base, make_recipe, make_tokenizer, rows

from plait.training.callbacks import Monitor
from plait.training.trainer import train


def run(output: Path, shrink: str):
    rule = {"target_rank": 2, "warmup": 2, "final": 3, "shrink": shrink}
    changes = {"method": "adalora", "options": {"rank": 3}, "rules": [{"adalora": rule}]}
    recipe = make_recipe(output, steps=10, parity=False, **changes)
    return train(
        recipe, model=make_base(), tokenizer=make_tokenizer(), data=rows(), quiet=True
    ).adapter


# The pattern is final from step 7 on; checkpoints stand at 3, 6 and 9.
@pytest.mark.parametrize(("shrink", "at"), [("final", 5), ("final", 9), ("always", 8), ("end", 9)])
def test_resuming_gives_the_same_ranks_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shrink: str, at: int
) -> None:
    whole = run(tmp_path / "whole", shrink)
    with monkeypatch.context() as patch:
        real = Monitor.on_step_end

        def on_step_end(self, args, state, control, **more):
            real(self, args, state, control, **more)
            if state.global_step == at:
                raise KeyboardInterrupt

        patch.setattr(Monitor, "on_step_end", on_step_end)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", shrink)
    torch.manual_seed(99)
    resumed = run(tmp_path / "cut", shrink)
    ranks = {path: delta.rank for path, delta in whole.deltas.items()}
    assert sum(ranks.values()) == 2 * len(ranks) and len(set(ranks.values())) > 1
    assert {path: delta.rank for path, delta in resumed.deltas.items()} == ranks
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, atol=1e-6, rtol=1e-4)
