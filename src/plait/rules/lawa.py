"""LAWA: the plain mean of the last k checkpoints of the adapter.

    theta_0 ─── theta_e ─── theta_2e ─── ... ─── theta_T
                               └── mean of the last k ──┘

What an earlier, worse adapter was does not count at all, as it does a little in a moving average;
the price is the memory of k copies of the adapter (in its own dtype, on its own device). The mean
is taken in float32 at least when it is asked for: at the end of the run, where the adapter takes it
over, or (`use: keep`) by `average()` and `averaged()`. A and B are averaged each by itself, which
is meaningful along one run.
Paper: Kaddour, 2022, arXiv 2209.14981. No parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter import Method, Run
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.rules._average import AveragingRule, widened


@dataclass
class Lawa(AveragingRule):
    last: int = 6
    """k, checkpoints that count (the paper: 6)."""
    every: float = 0.02
    """Steps between checkpoints; a share of the run below 1 (the paper: an epoch)."""
    use: Literal["at_finish", "keep"] = "at_finish"
    """Whether the adapter becomes the average at the end of the run."""

    def __post_init__(self) -> None:
        check_choices(self, "lawa")
        if self.last < 1 or self.every <= 0:
            raise PlaitError("lawa: last must be at least 1, and every above 0.")

    def check(self, run: Run) -> None:
        super().check(run)
        run.steps(self.every)

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._every = run.steps(self.every)
        self._kept: list[list[Tensor]] = []  # oldest first

    def after_step(self) -> None:
        if self.run.step % self._every == 0:
            kept = [p.detach().clone() for p in self._parameters]
            self._kept = [*self._kept, kept][-self.last :]

    @torch.no_grad()
    def _values(self) -> list[Tensor] | None:
        if not self._kept:
            return None
        total = widened(self._kept[0])
        for other in self._kept[1:]:
            torch._foreach_add_(total, [t.to(m.dtype) for t, m in zip(other, total, strict=True)])
        torch._foreach_div_(total, len(self._kept))
        return total

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [self._named(kept) for kept in self._kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = [self._ordered(kept) for kept in state["kept"]]


METHOD = Method(
    name="lawa",
    title="LAWA: the mean of the adapter's last checkpoints",
    paper="Kaddour, 2022, arXiv 2209.14981",
    axis="rule",
    rule=Lawa,
    rule_example={"last": 3, "every": 1},
)
