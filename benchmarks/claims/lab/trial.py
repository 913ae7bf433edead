"""One training run: a contender on a task at one learning rate and seed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import plait
from lab.contender import Contender
from lab.tasks import Task

Found = dict[str, Any]


def run_trial(task: Task, contender: Contender, rate: float, seed: int, steps: int) -> Found:
    """Scores on validation and test, the training curve, parameters, and what it cost.

    AdamW without decay, a tenth of the steps to warm up, then a cosine to zero; gradients clipped
    at 1. The order of the data depends on the seed alone, so that seeds are paired.
    """
    torch.manual_seed(seed)
    model = task.fresh()
    parameters, run = _contestant(task, contender, model, rate, steps, seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: _factor(step, steps))
    curve, start = [], time.process_time()
    model.train()
    for batch in itertools.islice(task.batches(seed), steps):
        loss = model(**batch).loss + run.extra_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            [p for group in run.optimizer.param_groups for p in group["params"]], 1.0
        )
        run.step()
        schedule.step()
        curve.append(round(loss.item(), 5))
    run.finish()
    return {
        "rate": rate,
        "seed": seed,
        "validation": task.score(model, "validation"),
        "test": task.score(model, "test"),
        "curve": curve,
        "parameters": parameters,
        "seconds": round(time.process_time() - start, 3),
    }


def _factor(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warm) / (steps - warm)))))


def _contestant(
    task: Task, contender: Contender, model: nn.Module, rate: float, steps: int, seed: int
) -> tuple[int, Any]:
    """(trainable parameters without the head, the run that moves them)."""
    if contender.method == "full":
        count = sum(p.numel() for p in model.parameters())
        if contender.rules:
            rules = plait.RuleStack(model, contender.rules, lr=rate, total_steps=steps, seed=seed)
            return count, rules
        return count, _Plain(torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0))
    options: Mapping[str, Any] = {"targets": task.targets, **contender.options}
    adapter = plait.attach(
        model,
        contender.method,
        initializer=contender.initializer,
        data=list(itertools.islice(task.batches(seed + 1000), 4)),
        train_modules=task.head,
        seed=seed,
        **options,
    )
    head = sum(p.numel() for name in task.head for p in model.get_submodule(name).parameters())
    count = adapter.num_parameters() - head
    run = plait.RuleStack(
        model,
        contender.rules,
        lr=rate,
        total_steps=steps,
        seed=seed,
        validation=list(task.held_out()),
    )
    return count, run


class _Plain:
    """The interface of a RuleStack over a bare optimiser."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def extra_loss(self) -> float:
        return 0.0

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def finish(self) -> None:
        """Nothing is left to do."""
