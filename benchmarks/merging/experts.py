"""The experts: one LoRA for each held-in task, and one trained on all of them for comparison.

Rank 8 on every linear layer of the encoder (36 sites), AdamW under bfloat16 autocast, a tenth of
the steps to warm up, then a cosine to zero. An expert is kept in `runs/` (never committed) and
found by everything that made it; training one takes about a CPU minute.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.merging.scorer import Scorer, joined
from torch import Tensor

import plait
from plait.adapter import Adapter

RUNS = Path(__file__).parent / "runs"
JOINT = "joint"
"""How the name begins of an adapter that is trained on all tasks."""
Rows = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """How an expert is trained; the multi-task adapter takes `joint_steps` over all tasks' rows."""

    rank: int = 8
    alpha: float = 16.0
    lr: float = 2e-3
    batch: int = 16
    steps: int = 120
    joint_steps: int = 240
    seed: int = 0

    def folder(self, name: str, runs: Path = RUNS) -> Path:
        """Where the expert lies: the name, and a digest of what made it."""
        made = {key: value for key, value in asdict(self).items() if not key.endswith("steps")}
        steps = self.joint_steps if name.startswith(JOINT) else self.steps
        text = json.dumps({"name": name, "data": 1, "steps": steps, **made}, sort_keys=True)
        return runs / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def expert(
    scorer: Scorer,
    name: str,
    tasks: Mapping[str, Rows],
    recipe: Recipe,
    runs: Path = RUNS,
) -> tuple[Adapter, dict[str, Any]]:
    """(adapter, its facts) from the cache, or trained now on `tasks` {name: encoded rows}.

    Batches hold rows of one task; with several tasks each comes in turn.
    """
    folder = recipe.folder(name, runs)
    if not folder.is_dir():
        _train(scorer, name, tasks, recipe, folder)
    facts = json.loads((folder / "facts.json").read_text())
    adapter = plait.read_adapter(folder / "adapter")
    adapter.name = name
    return adapter, facts


def _train(
    scorer: Scorer, name: str, tasks: Mapping[str, Rows], recipe: Recipe, folder: Path
) -> None:
    steps = recipe.joint_steps if name.startswith(JOINT) else recipe.steps
    torch.manual_seed(recipe.seed)
    adapter = plait.attach(
        scorer, "lora", rank=recipe.rank, alpha=recipe.alpha, targets="all-linear", name=name,
        seed=recipe.seed,
    )  # fmt: skip
    start = time.process_time()
    try:
        curve = _descend(scorer, adapter, _batches(tasks, recipe), recipe.lr, steps)
        facts = {
            "name": name,
            **asdict(recipe),
            "steps": steps,
            "rows": {task: len(rows) for task, rows in tasks.items()},
            "parameters": adapter.num_parameters(),
            "first_loss": sum(curve[:10]) / len(curve[:10]),
            "last_loss": sum(curve[-10:]) / len(curve[-10:]),
            "cpu_s": round(time.process_time() - start, 1),
        }
        _keep(adapter, facts, folder)
    finally:
        plait.detach(scorer, name)


def _descend(
    scorer: Scorer,
    adapter: Adapter,
    source: Iterator[dict[str, Tensor]],
    lr: float,
    steps: int,
) -> list[float]:
    weights = [p for p in adapter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, steps))
    curve = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = scorer(**next(source)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        curve.append(loss.item())
    return curve


def factor(step: int, steps: int) -> float:
    """Of the learning rate: up over the first tenth, then a cosine to zero."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def _batches(tasks: Mapping[str, Rows], recipe: Recipe) -> Iterator[dict[str, Tensor]]:
    """Shuffled epochs of every task, one batch of each in turn, without end."""
    sources = [_endless(rows, recipe.batch, recipe.seed) for rows in tasks.values()]
    while True:
        for source in sources:
            yield joined(next(source))


def _endless(rows: Rows, size: int, seed: int) -> Iterator[list[Any]]:
    g = torch.Generator().manual_seed(seed)
    left: list[int] = []
    while True:
        while len(left) < size:
            left += torch.randperm(len(rows), generator=g).tolist()
        yield [rows[i] for i in left[:size]]
        left = left[size:]


def _keep(adapter: Adapter, facts: dict[str, Any], folder: Path) -> None:
    """Whole or not at all."""
    work = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    adapter.save(work / "adapter")
    (work / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    os.rename(work, folder)
