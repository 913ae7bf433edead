"""MWA: the mean of one run's checkpoints, weighted by a metric of each.

    power         v_i = score_i^p                       score = 1 / loss_i, or step_i
    exponential   v_i = exp(-p (loss_i - least) / (greatest - least)), or exp(p step_i / last)
    dW = sum_i w_i dW_i      w_i = v_i / sum v, times the merge's own weights as shares

p = 0 is the plain mean, a large p the best (or last) checkpoint. The sum is that of the changes, by
concatenation and exact, so it is also right for runs whose factors were turned or grew between
checkpoints (the factors' means are not). Take as loss a running mean around the checkpoint, not
that of one batch.
Paper: Yu and Choi, Metrics-Weighted Averaging, 2025, arXiv 2504.18580. Departure: its penalty is
given one factor; both usual forms of such a factor are here, without a claim to be the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.merging.method import MergeMethod
from plait.merging.methods._shares import SharesMerge


@dataclass
class Mwa(SharesMerge):
    metric: Sequence[float] | None = None
    """One number above 0 for each input; None weighs all alike."""
    kind: Literal["loss", "steps"] = "loss"
    """Lower is better (loss), or later is better (steps)."""
    penalty: float = 1.0
    """p: how sharply the better ones are preferred (0: not at all)."""
    form: Literal["power", "exponential"] = "power"
    """How a metric becomes a weight; the power's does not depend on the metric's unit."""

    def __post_init__(self) -> None:
        check_choices(self, "mwa")
        for number in self.metric or ():
            if not (number > 0 and math.isfinite(number)):
                raise PlaitError(f"mwa: metrics are finite numbers above 0, not {number}.")
        if self.penalty < 0:
            raise PlaitError(f"mwa: penalty is 0 or more, not {self.penalty}.")

    def shares(self, path: str, weights: Sequence[float]) -> list[float]:
        """The merge's weights, with those of the metric; their sum stays what it was."""
        if self.metric is None:
            return list(weights)
        if len(self.metric) != len(weights):
            raise PlaitError(
                f"mwa: {len(self.metric)} metrics for {len(weights)} inputs; give one for each."
            )
        m = torch.tensor(list(self.metric), dtype=torch.float64)
        if self.form == "power":
            score = m.log() * (self.penalty if self.kind == "steps" else -self.penalty)
        elif self.kind == "steps":
            score = self.penalty * m / m.max()
        else:
            spread = m.max() - m.min()
            score = -self.penalty * (m - m.min()) / (spread if spread > 0 else 1.0)
        own = torch.tensor(list(weights), dtype=torch.float64)
        found = own * (score - score.max()).exp()
        total = float(found.sum())
        if total == 0:
            return [0.0] * len(weights)
        return (found * (float(own.sum()) / total)).tolist()


METHOD = MergeMethod(
    name="mwa",
    title="MWA: checkpoints weighted by their loss or step",
    paper="Yu and Choi, Metrics-Weighted Averaging, 2025, arXiv 2504.18580",
    merge=Mwa,
)
