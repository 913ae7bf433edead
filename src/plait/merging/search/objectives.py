"""What a search may minimise: `objective(model, step) -> scalar`, with the coefficients in use.

Any function of that form will do. Those here take lists of batches (dicts for `model(**batch)`) and
pick those of a step from the step's number and a seed, so that a resumed search sees the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.statistics.frozen import shifts_labels, to_device
from plait.statistics.gradients import Loss

Objective = Callable[[nn.Module, int], Tensor]
Batch = Mapping[str, Any]
Logits = Callable[[nn.Module, Batch, int], Tensor]
"""`logits(model, batch, task)`: for models with a head for each task."""


@dataclass(frozen=True)
class Picked:
    """The batches of a step: all of them, or `each` of a new shuffle an epoch."""

    batches: Sequence[Batch]
    each: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.batches:
            raise PlaitError("an objective needs at least one batch.")

    def at(self, step: int) -> list[Batch]:
        if self.each is None:
            return list(self.batches)
        count, found = len(self.batches), []
        for place in range(step * self.each, (step + 1) * self.each):
            g = torch.Generator().manual_seed(self.seed * 1_000_003 + place // count)
            found.append(self.batches[int(torch.randperm(count, generator=g)[place % count])])
        return found


def supervised(
    batches: Sequence[Batch], loss: Loss | None = None, *, each: int | None = None, seed: int = 0
) -> Objective:
    """The mean over a step's batches of `loss(model, batch)`, or of `model(**batch).loss`."""
    picked = Picked(list(batches), each, seed)

    def objective(model: nn.Module, step: int) -> Tensor:
        here = [_loss(model, batch, loss) for batch in picked.at(step)]
        return torch.stack(here).mean()

    return objective


def entropy(
    tasks: Sequence[Sequence[Batch]],
    logits: Logits | None = None,
    *,
    each: int | None = 1,
    seed: int = 0,
) -> Objective:
    """The predictions' mean entropy in nats, summed over the tasks; needs no labels.

    Of sequences every position counts that is not padding, or with labels those that predict one.
    Minimising it long enough predicts one class for everything: few steps, and watch the classes.
    """
    picked = [Picked(list(batches), each, seed + i) for i, batches in enumerate(tasks)]

    def one(model: nn.Module, batch: Batch, task: int) -> Tensor:
        log_p = predictions(model, batch, task, logits).float().log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1).mean()

    def objective(model: nn.Module, step: int) -> Tensor:
        return torch.stack(
            [
                torch.stack([one(model, batch, task) for batch in p.at(step)]).mean()
                for task, p in enumerate(picked)
            ]
        ).sum()

    return objective


def _loss(model: nn.Module, batch: Batch, loss: Loss | None) -> Tensor:
    here = to_device(batch, _device(model))
    if loss is not None:
        return loss(model, here)
    value = getattr(model(**here), "loss", None)
    if value is None:
        raise PlaitError(
            f"{type(model).__name__} returned no loss; put `labels` into the batches or pass loss=."
        )
    return value


def predictions(model: nn.Module, batch: Batch, task: int, logits: Logits | None) -> Tensor:
    """The logits that count, [n, classes]."""
    here = to_device(batch, _device(model))
    if logits is not None:
        found: Any = logits(model, here, task)
    else:
        # Labels would only make the model compute a loss that nobody reads.
        output = model(**{k: v for k, v in here.items() if k != "labels"})
        found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        found = output[0] if found is None else found
    counted = _counted(model, here, found)
    return found.flatten(0, -2) if counted is None else found[counted]


def _counted(model: nn.Module, batch: Batch, logits: Tensor) -> Tensor | None:
    """Which positions' predictions count [rows, tokens], or None for all."""
    if logits.dim() != 3:
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    counted = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    if mask is not None and mask.shape == counted.shape:
        counted &= mask.bool()
    if labels is not None and labels.shape == counted.shape:
        labelled = labels != -100
        if shifts_labels(model):
            labelled = torch.cat([labelled[:, 1:], torch.zeros_like(labelled[:, :1])], 1)
        counted &= labelled
    return counted


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
