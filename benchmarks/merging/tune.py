"""A budget of evaluations on validation rows, spent alike on every merge method.

A method has a factor on its result and perhaps one knob with a few values. The search is the same
for all: double or halve the factor from 1 while that helps, try the knob's other values at the best
norm, then refine the factor by ever smaller steps until the budget is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

BUDGET = 8
"""Evaluations a method."""

Ask = Callable[[Any, float], float]
"""`(the knob's value, the factor) -> what to raise`."""


@dataclass
class Tuned:
    """The best (knob, factor), its value, and all that was asked, in order."""

    knob: Any = None
    factor: float = 1.0
    value: float = float("-inf")
    asked: list[tuple[Any, float, float]] = field(default_factory=list)


def tune(
    ask: Ask,
    knobs: Sequence[Any] = (None,),
    norms: Callable[[Any], float] | None = None,
    budget: int = BUDGET,
) -> Tuned:
    """Spend exactly `budget` evaluations; `knobs` begins with the method's default.

    `norms(knob)` is the norm of the merge at factor 1: other knobs are tried at the best's norm.
    """
    found = Tuned()

    def probe(knob: Any, factor: float) -> bool:
        """Whether this is better than all before; nothing is asked twice, nor beyond the budget."""
        if len(found.asked) >= budget or any(
            knob == k and abs(factor / f - 1) < 1e-3 for k, f, _ in found.asked
        ):
            return False
        value = ask(knob, factor)
        found.asked.append((knob, factor, value))
        if value <= found.value:
            return False
        found.knob, found.factor, found.value = knob, factor, value
        return True

    room = budget - (len(knobs) - 1)  # every other knob shall have its turn
    probe(knobs[0], 1.0)
    for step in (2.0, 0.5):
        if step == 0.5 and found.factor != 1.0:
            break
        while len(found.asked) < room and probe(found.knob, found.factor * step):
            pass
    for knob in knobs[1:]:
        ratio = norms(found.knob) / norms(knob) if norms is not None and norms(knob) else 1.0
        probe(knob, found.factor * ratio)
    step = 2.0**0.5
    while len(found.asked) < budget and step > 1.005:
        if not (probe(found.knob, found.factor * step) or probe(found.knob, found.factor / step)):
            step **= 0.5
    return found
