"""`Problem`: the adapters whose coefficients are searched, and what is known of the tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.merging.search.objectives import Batch, Logits, Objective, supervised
from plait.merging.search.trials import Log
from plait.statistics.gradients import Loss

Wants = Literal["loss", "inputs", "experts", "metrics", "scores"]
WANTS: dict[Wants, str] = {
    "loss": "labelled rows",
    "inputs": "inputs of each task, without labels",
    "experts": "inputs of each expert, without labels",
    "metrics": "a metric of each task",
    "scores": "a score of each example",
}
"""What a method may want, and what that is."""

Metric = Callable[[nn.Module], float]
"""Of the model with coefficients in use: a number, the greater the better."""
Score = Callable[[nn.Module], Tensor]
"""Of the model with coefficients in use: a number in [0, 1] for each example, without chance."""


@dataclass(frozen=True)
class Problem:
    """Given whole to a method, which takes what it wants; PlaitError where that is not there."""

    model: nn.Module
    names: list[str]
    tasks: Mapping[str, Sequence[Batch]] = field(default_factory=dict)
    """{task: its batches}, dicts of keyword arguments for the model."""
    loss: Loss | None = None
    """`loss(model, batch) -> scalar`; None takes `model(**batch).loss`."""
    logits: Logits | None = None
    objective: Objective | None = None
    """What to lower, in place of the loss on the batches."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """{task: its metric}."""
    scores: Score | None = None
    seed: int = 0
    log: Log = field(default_factory=Log)

    def lowered(self, each: int | None = None) -> Objective:
        """The objective, or else the loss: the tasks' mean over all batches, or with `each` the
        mean of so many of them, shuffled, a step."""
        if self.objective is not None:
            return self.objective
        tasks = list(self._given("loss").values())
        if each is not None or len(tasks) == 1:
            batches = [batch for task in tasks for batch in task]
            return supervised(batches, self.loss, each=each, seed=self.seed)
        parts = [supervised(task, self.loss) for task in tasks]
        return lambda model, step: torch.stack([part(model, step) for part in parts]).mean()

    def inputs(self) -> list[Sequence[Batch]]:
        """Batches by task."""
        return list(self._given("inputs").values())

    def of_experts(self) -> dict[str, Sequence[Batch]]:
        """{adapter: its batches}, in the adapters' order."""
        given = self._given("experts")
        if set(given) != set(self.names):
            raise PlaitError(
                f"inputs are wanted of each expert, under its name: {', '.join(self.names)}; there "
                f"are those of {', '.join(given)}."
            )
        return {name: given[name] for name in self.names}

    def measured(self) -> Mapping[str, Metric]:
        if not self.metrics:
            raise PlaitError(f"this search wants {WANTS['metrics']}; give `metrics`.")
        return self.metrics

    def scored(self) -> Score:
        if self.scores is None:
            raise PlaitError(f"this search wants {WANTS['scores']}; give `scores`.")
        return self.scores

    def _given(self, wants: Wants) -> Mapping[str, Sequence[Batch]]:
        if not self.tasks or not all(self.tasks.values()):
            raise PlaitError(f"this search wants {WANTS[wants]}; give `data`.")
        return self.tasks
