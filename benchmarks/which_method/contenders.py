"""The methods, and how much each bake-off asks of them: fixed before anything was run."""

from __future__ import annotations

from dataclasses import dataclass

METHODS = (
    *("lora", "lora+lora-plus", "dora", "pissa", "olora", "lora-xs", "delora", "hra", "randlora"),
    *("fourierft", "kasa", "loha", "paca", "hira", "ia3", "none"),
)
"""Parameterisations of every family (pairs, cores, rotations, transforms, products, columns,
scaling), starts, a rule, and full training. All are sized to LoRA's count of parameters at the
task's rank, as nearly as they can be."""

ALWAYS = ("lora",)
"""In the final on the language model whatever came before."""


@dataclass(frozen=True)
class Length:
    """Trials of one task: learning rates and seeds a method, in so much wall time at most."""

    trials: int
    seeds: int
    budget: str | None = None


LENGTHS = {
    "digits": Length(7, 5),
    "intent": Length(5, 3),
    "sentiment": Length(5, 3),
    "language": Length(5, 3),
    "home": Length(4, 3, "30m"),
}
FINALISTS = 5
"""Methods that go on to the language model: those of the best mean rank before."""
SMOKE = Length(1, 2)
