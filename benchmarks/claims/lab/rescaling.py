"""What an optimiser makes of a pair's scale: 10 A and B / 10 are the same dW, and to one that looks
at dW alone also the same run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

import plait
from lab.tasks import TASKS, Batch

RANK = {"rank": 4, "alpha": 4}


def rescaling_effect(
    rules: Sequence[Any],
    rate: float,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    *,
    factor: float = 10.0,
    warm: int = 20,
    steps: int = 50,
    task: str = "digits-vit",
) -> float:
    """How much the loss after `steps` steps changes, as a share of it, when A is multiplied by
    `factor` and B divided by it before they begin.

    LoRA is trained for `warm` steps of AdamW first, as B starts at 0. Float64 throughout, so that
    what is left of an invariant rule is its damping, and everything is drawn from fixed seeds.
    """
    losses = [_loss(rules, rate, optimizer, f, warm, steps, task) for f in (1.0, factor)]
    return abs(losses[1] / losses[0] - 1)


def _loss(
    rules: Sequence[Any],
    rate: float,
    optimizer: Callable[..., torch.optim.Optimizer] | None,
    factor: float,
    warm: int,
    steps: int,
    name: str,
) -> float:
    """The loss on the training split."""
    task = TASKS[name]
    torch.manual_seed(0)
    model = task.fresh().double().train()
    adapter = plait.attach(model, "lora", targets=task.targets, seed=0, **RANK)
    batches = (_double(b) for b in task.batches(0))
    _run(model, plait.RuleStack(model, lr=3e-3), itertools.islice(batches, warm))
    with torch.no_grad():
        for pair in adapter.pairs():
            pair.A.mul_(factor)
            pair.B.div_(factor)
    run = plait.RuleStack(
        model, rules, lr=rate, total_steps=steps, seed=0, optimizer_factory=optimizer
    )
    _run(model, run, itertools.islice(batches, steps))
    with torch.no_grad():
        return float(model.eval()(**_double(dict(task.splits()["train"]))).loss)


def _run(model: Any, run: plait.RuleStack, batches: Any) -> None:
    for batch in batches:
        (model(**batch).loss + run.extra_loss()).backward()
        run.step()
    run.finish()


def _double(batch: Batch) -> Batch:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
