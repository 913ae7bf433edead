"""Asynchronous successive halving: stop a trial that is not among the best so far.

At a quarter and at half of a trial's steps its validation loss is compared with what finished
trials of the same method had there; it goes on when it is in the best 1/eta of them (the first
always does). Only trials of earlier rounds count, so that the outcome does not depend on how many
run at once. Paper: Li et al., 2018, "A System for Massively Parallel Hyperparameter Tuning".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

ETA = 2
SHARES = (0.25, 0.5)


def rungs(steps: int) -> list[int]:
    """The steps after which a trial is looked at, the last step left out."""
    return sorted({round(share * steps) for share in SHARES} - {0, steps})


def goes_on(value: float, rivals: Sequence[float], eta: int = ETA) -> bool:
    """Whether a trial with this loss goes on, `rivals` being the others' losses at its rung."""
    if not math.isfinite(value):
        return False
    ranked = sorted([*rivals, value])
    return value <= ranked[max(1, len(ranked) // eta) - 1]
