"""When sites grow, how many at a time and by how much, so that a rank budget is reached in time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from plait.adapter import Run
from plait.errors import PlaitError
from plait.linalg import best_components
from plait.rules._gated import GatedDelta


@dataclass(frozen=True)
class GrowthPlan:
    target: int
    """Active components over all sites at the end."""
    start: int
    """Step of the first growth."""
    every: int
    """Steps between growths."""
    sites: int
    """How many grow at a time."""

    def due(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0


def plan_growth(run: Run, found: Mapping[str, GatedDelta], o: Any) -> GrowthPlan:
    """A plan whose last growth comes by `o.finish_by`.

    `o` has `target_rank`, `top_h`, `warmup`, `interval` and `finish_by` of rule increlora. Raises
    PlaitError where nothing is in reserve, or where the run is too short for them.
    """
    deltas = list(found.values())
    target = round(o.target_rank * len(deltas))
    missing = target - sum(d.rank for d in deltas)
    # A resumed adapter that has reached its budget has no reserve any more, and needs none.
    stuck = next((name for name, d in found.items() if d.reserve == 0), None)
    if missing > 0 and stuck is not None:
        raise PlaitError(f"increlora: {stuck!r} has no reserve to grow from; set reserve.")
    growths = math.ceil(missing / max(1, deltas[0].options.reserve))
    start, every, sites = run.steps(o.warmup), o.interval or 20, o.top_h or 5
    if run.total_steps is None and (o.finish_by < 1 or o.interval):
        return GrowthPlan(target, start, every, sites)
    room = max(0, run.steps(o.finish_by) - start)
    if o.top_h is None:
        rounds = max(1, room // o.interval if o.interval else room)
        sites = min(len(deltas), max(5, math.ceil(growths / rounds)))
    rounds = math.ceil(growths / sites)
    if o.interval is None and rounds > 0:
        every = max(1, room // rounds)
    if run.step == 0 and (rounds - 1) * every > room:
        raise PlaitError(
            f"increlora: {rounds} growths every {every} steps do not end by step "
            f"{start + room}; raise top_h or the steps, or lower interval or target_rank."
        )
    return GrowthPlan(target, start, every, sites)


def dealt(
    scores: Mapping[str, float], reserves: Mapping[str, int], sites: int, missing: int
) -> dict[str, int]:
    """{name: components gained} of at most `sites` sites, those of highest score.

    Each grows by its reserve, as far as the `missing` components go. Names break ties, so that
    equal scores (all zero at first) cannot depend on the order of the sites.
    """
    one = {n: torch.tensor([scores.get(n, 0.0)], dtype=torch.float64) for n in sorted(reserves)}
    growing = [name for name, best in best_components(one, sites).items() if best.any()]
    slots = best_components({name: one[name].expand(reserves[name]) for name in growing}, missing)
    return {name: int(best.sum()) for name, best in slots.items() if best.any()}
