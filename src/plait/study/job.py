"""What a trial is asked to do, and what came of it: both plain data that other processes take."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from plait.training.recipe import Recipe

Kind = Literal["base", "probe", "tune", "final"]
Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What one trial is to do; it travels to other processes and machines.

    Attributes:
        label: the contender's.
        recipe: with the trial's method, options, lr, seed and steps; None for the bare base.
        kind: "base" and "probe" measure costs, "tune" validates, "final" scores too.
        rivals: {step: validation losses there of earlier trials of this method}; None: no pruning.
        deadline: when to stop, in seconds since the epoch.
        folder: where a finalist's adapter is kept.
        examples: score the first so many test examples; None: all.
    """

    label: str
    recipe: Recipe | None
    kind: Kind
    rivals: Mapping[int, list[float]] | None = None
    deadline: float = math.inf
    folder: str | None = None
    examples: int | None = None

    @property
    def key(self) -> str:
        """What a stored record is found by: everything that its outcome depends on."""
        recipe = None if self.recipe is None else dataclasses.asdict(self.recipe)
        if recipe is not None:
            recipe.pop("output")
        text = json.dumps(
            [self.label, recipe, self.kind, self.rivals, self.examples], sort_keys=True, default=str
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class Course:
    """What was seen on the way."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rungs: dict[int, float] = field(default_factory=dict)

    def step_seconds(self) -> float | None:
        """Median of a step, the first (which warms up) left out where there are others."""
        return median(self.seconds[1:] or self.seconds) if self.seconds else None

    def as_record(self) -> Record:
        """The curves, in the digits that plots show."""
        return {
            "losses": [float(f"{x:.5g}") for x in self.losses],
            "seconds": [float(f"{x:.4g}") for x in itertools.accumulate(self.seconds)],
            "rungs": {str(step): value for step, value in self.rungs.items()},
            "step_seconds": self.step_seconds(),
        }
