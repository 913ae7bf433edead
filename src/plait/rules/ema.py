"""EMA: an exponential moving average of the adapter, which ends steadier than its last step.

    avg_n = a avg_{n-1} + (1 - a) theta_n       a = min(1 - 1/n, decay),  n the averages so far

so that the first ones weigh alike instead of the start weighing most; `decay: 1` is the plain mean
of all (Polyak's averaging; with `start` late and a constant rate, SWA's). The adapter itself trains
as without the rule. At the end it takes the average over, or (`use: keep`) `average()` gives it and
`averaged()` answers with it. A and B are averaged each by itself, which is meaningful along one
run. The average is float32 at least; a step costs one pass over the adapter, and no other memory.
Papers: Polyak and Juditsky, 1992; Izmailov et al., 2018, arXiv 1803.05407. No parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter import Method, Run
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.rules._average import AveragingRule, move_average, widened


@dataclass
class Ema(AveragingRule):
    decay: float = 0.999
    """Weight of what was averaged before; 1 averages all alike."""
    start: float = 0.0
    """Steps before the first one that counts; a share of the run below 1 (SWA: 0.75)."""
    every: int = 1
    """Steps between those that count (SWA: an epoch)."""
    use: Literal["at_finish", "keep"] = "at_finish"
    """Whether the adapter becomes the average at the end of the run."""

    def __post_init__(self) -> None:
        check_choices(self, "ema")
        if not 0 <= self.decay <= 1:
            raise PlaitError(f"ema: decay must lie in [0, 1], not {self.decay}.")
        if self.every < 1:
            raise PlaitError(f"ema: every must be at least 1, not {self.every}.")

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._first = run.steps(self.start)
        self._count = 0
        self._mean: list[Tensor] = []

    @torch.no_grad()
    def after_step(self) -> None:
        past = self.run.step - self._first
        if past <= 0 or past % self.every:
            return
        self._count += 1
        if self._count == 1:
            self._mean = widened(self._parameters)
        else:
            kept = min(1 - 1 / self._count, self.decay)
            move_average(self._mean, self._parameters, 1 - kept)

    def _values(self) -> list[Tensor] | None:
        return self._mean if self._count else None

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "mean": self._named(self._mean) if self._count else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = int(state["count"])
        self._mean = self._ordered(state["mean"]) if self._count else []


METHOD = Method(
    name="ema",
    title="EMA: the adapter's moving average over its run",
    paper="Izmailov et al., 2018, arXiv 1803.05407",
    axis="rule",
    rule=Ema,
    rule_example={"decay": 0.9},
)
