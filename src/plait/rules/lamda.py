"""LaMDA: train a small matrix between W's singular directions; its output side freezes gradually.

    dW = s B S A        A [r, in] frozen        S [r, r] trains        B [out, r] freezes by columns

A and B are W's leading right and left singular vectors, S its singular values over s, and what they
make of W is held back, so that training starts at the base model. After t of t_i steps only
ceil(r (1 - t / t_i)) columns of B still move, those of the largest singular values stopping first;
from t_i on, S alone does. A frozen column is put back after each step, bit for bit: with its
gradient masked instead, the optimiser's momentum and decay would go on moving it.
Departures from the authors' code, whose counter stops three columns at most, and whose factors
start at random: this is the paper.
Paper: Azizi, Kundu, Pedram, 2024, arXiv 2406.12832. Parameters: r^2 + r out a site at the start,
r^2 in the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Method, Rule, Run, per_site
from plait.errors import PlaitError
from plait.rules._sandwich import SandwichDelta, SandwichOptions, sandwich_count


@dataclass
class Lamda(Rule):
    freeze_by: float = 0.3
    """When all of B is frozen; a share of the run below 1, a step from 1 on, 0 at once (the
    paper's eta: 0.3)."""

    def check(self, run: Run) -> None:
        super().check(run)
        if self.freeze_by < 0:
            raise PlaitError(f"lamda: freeze_by must be at least 0, not {self.freeze_by}.")
        if not list(run.deltas(SandwichDelta).values()):
            raise PlaitError("rule Lamda freezes the B of lamda's deltas; attach method lamda.")
        run.steps(self.freeze_by)  # raises where it is a share of an unknown length

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._deltas = list(run.deltas(SandwichDelta).values())
        self._last = run.steps(self.freeze_by)
        self._kept: list[tuple[Any, Tensor]] = []

    def trainable(self, rank: int) -> int:
        """How many of `rank` columns the coming step moves."""
        left = self._last - self.run.step
        return 0 if left <= 0 else -(-rank * left // self._last)

    def before_step(self) -> None:
        for delta in self._deltas:
            moving = self.trainable(delta.rank)
            if moving == 0:
                delta.B.grad = None  # optimisers pass such a parameter over
                self._forget(delta.B)
            elif moving < delta.rank:
                frozen = delta.B[:, : delta.rank - moving]
                self._kept.append((frozen, frozen.detach().clone()))

    def after_step(self) -> None:
        with torch.no_grad():
            for columns, values in self._kept:
                columns.copy_(values)
        self._kept = []

    def _forget(self, parameter: Any) -> None:
        """Moments that no step will use any more."""
        optimizer = getattr(self.run.optimizer, "optimizer", self.run.optimizer)
        if optimizer is not None:
            optimizer.state.pop(parameter, None)


METHOD = Method(
    name="lamda",
    title="LaMDA: large model fine-tuning via spectrally decomposed low-dimensional adaptation",
    paper="Azizi et al., 2024, arXiv 2406.12832",
    axis="parameterisation",
    options=SandwichOptions,
    delta=SandwichDelta,
    rule=Lamda,
    count=per_site(sandwich_count),
)
