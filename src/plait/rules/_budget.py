"""A rank budget that falls along a cubic, from what an adapter starts with to what it may keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plait.adapter import Run
from plait.errors import PlaitError
from plait.rules._triplets import TripletDelta


@dataclass(frozen=True)
class BudgetPlan:
    start: int
    """Triplets over all sites until step `first`."""
    target: int
    """Triplets from step `last` on."""
    first: int
    last: int

    def at(self, step: int) -> int:
        """How many triplets may be left after optimiser step `step`, counted from 1."""
        if step >= self.last:
            return self.target
        if step <= self.first:
            return self.start
        left = 1 - (step - self.first) / (self.last - self.first)
        return int((self.start - self.target) * left**3 + self.target)


def plan_budget(run: Run, found: Mapping[str, TripletDelta], o: Any) -> BudgetPlan:
    """The plan for these sites, from the ranks they have now.

    `o` has `target_rank`, `warmup` and `final` of rule adalora. Raises PlaitError where the run's
    length is unknown, its phases overlap, or there is less at the start than is aimed at.
    """
    if run.total_steps is None:
        raise PlaitError("rule Adalora spreads its budget over the run and needs total_steps.")
    start, sites = sum(d.rank for d in found.values()), len(found)
    target = round(start * 2 / 3) if o.target_rank is None else round(o.target_rank * sites)
    if not 0 < target <= start:
        raise PlaitError(
            f"adalora: target_rank {o.target_rank} must lie above 0 and at most at the average "
            f"rank at the start, {start / max(1, sites):g}; raise rank= or lower it."
        )
    first, last = run.steps(o.warmup), max(1, run.total_steps - run.steps(o.final))
    if first > last:
        raise PlaitError(
            f"adalora: {first} steps before pruning and {run.total_steps - last} after it leave "
            f"none of the {run.total_steps} for it; lower warmup or final."
        )
    return BudgetPlan(start, target, first, last)
