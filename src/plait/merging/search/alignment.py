"""Alignment with experts: the model with coefficients imitates expert i on expert i's inputs.

    loss = sum_i T^2 CE(softmax(expert_i / T), softmax(merged / T)) + hidden * mean |h - h_i|^2

An expert is the same base with its adapter alone active, so one model is in memory; its answers are
taken once, before the search. Needs no labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.adapter.site import first_input
from plait.errors import PlaitError, unknown
from plait.merging.search.objectives import Batch, Logits, Objective, Picked, predictions
from plait.statistics.frozen import frozen


@dataclass(frozen=True)
class _Known:
    batch: Batch
    task: int
    logits: Tensor
    hidden: dict[str, Tensor]


def alignment(
    model: nn.Module,
    data: Mapping[str, Sequence[Batch]],
    logits: Logits | None = None,
    *,
    temperature: float = 1.0,
    hidden: Sequence[str] = (),
    hidden_weight: float = 0.1,
    task_weights: Mapping[str, float] | None = None,
    each: int | None = None,
    seed: int = 0,
) -> Objective:
    """An objective for `Coefficients`; the experts answer now, kept on the CPU.

    Args:
        data: {adapter's name: its unlabelled batches}.
        logits: for models with a head for each task; the position in `data` is the task.
        hidden: paths of modules whose outputs are to be like the expert's too.
        each: batches of each expert that a step sees; None takes all.
    """
    if temperature <= 0:
        raise PlaitError(f"alignment: temperature must be greater than 0, not {temperature}.")
    known = {n: _answers(model, n, i, data[n], logits, hidden) for i, n in enumerate(data)}
    picked = {n: Picked(range(len(known[n])), each, seed + i) for i, n in enumerate(data)}  # type: ignore[arg-type]
    scales = task_weights or {}

    def objective(model: nn.Module, step: int) -> Tensor:
        total: list[Tensor] = []
        for name, some in picked.items():
            here = [known[name][int(i)] for i in some.at(step)]  # type: ignore[call-overload]
            gaps = [_gap(model, one, logits, temperature, hidden_weight) for one in here]
            total.append(scales.get(name, 1.0) * torch.stack(gaps).mean())
        return torch.stack(total).sum()

    return objective


def _answers(
    model: nn.Module,
    name: str,
    task: int,
    batches: Sequence[Batch],
    logits: Logits | None,
    hidden: Sequence[str],
) -> list[_Known]:
    found = []
    with frozen(model, name), torch.no_grad():
        for batch in batches:
            with _outputs(model, hidden) as seen:
                answer = predictions(model, batch, task, logits).to("cpu")
            if silent := [path for path in hidden if path not in seen]:
                raise PlaitError(f"alignment: {silent[0]!r} does not run, so it has no output.")
            found.append(_Known(batch, task, answer, {p: h.to("cpu") for p, h in seen.items()}))
    return found


def _gap(model: nn.Module, one: _Known, logits: Logits | None, T: float, weight: float) -> Tensor:
    with _outputs(model, list(one.hidden)) as seen:
        answer = predictions(model, one.batch, one.task, logits)
    wanted = (one.logits.to(answer) / T).softmax(-1)
    total = T * T * F.cross_entropy(answer / T, wanted)
    if one.hidden:
        gaps = [(seen[p] - h.to(seen[p])).square().mean() for p, h in one.hidden.items()]
        total = total + weight * torch.stack(gaps).mean()
    return total


@contextmanager
def _outputs(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What these modules return in a forward within the block."""
    seen: dict[str, Tensor] = {}
    known = dict(model.named_modules())
    for path in paths:
        if path not in known:
            raise unknown("module", path, known, where="the model")

    def hook(path: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen[path] = output if isinstance(output, Tensor) else first_input(output, {})

        return keep

    handles = [known[path].register_forward_hook(hook(path)) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
