"""The training batches of the last optimiser steps, for rules that run them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from plait.rules._passes import Pass, Passes

Batch = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of one forward."""


def batch_of(given: Any) -> Batch:
    """A remembered pass, or a batch as `Run.validation` holds it, as arguments."""
    if isinstance(given, Pass):
        return given.args, given.kwargs
    if isinstance(given, Mapping):
        return (), dict(given)
    return (tuple(given) if isinstance(given, tuple | list) else (given,)), {}


def batches_from(given: Sequence[Any] | None, first: int, count: int) -> list[Batch]:
    """`count` batches of `given` from number `first` on, round and round."""
    assert given
    return [batch_of(given[(first + i) % len(given)]) for i in range(count)]


class RecentBatches:
    """`note` after every micro-batch's forward, `advance` after every step; none if `count` is 0.

    The batches are kept as they came, so that they take memory where they are.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        self._passes, self.count = Passes(model) if count else None, count
        self._steps: list[list[Batch]] = [[]]  # the step under way comes last

    def note(self) -> None:
        if self._passes is not None and (done := self._passes.take()) is not None:
            self._steps[-1].append(batch_of(done))

    def steps(self) -> list[list[Batch]]:
        """The micro-batches of the last `count` steps, oldest first, that under way among them."""
        return [step for step in self._steps if step]

    def advance(self) -> None:
        self._steps = [*self._steps, []][-max(1, self.count) :]

    def close(self) -> None:
        self._steps = [[]]
        if self._passes is not None:
            self._passes.close()

    def state_dict(self) -> dict[str, Any]:
        return {"recent": [[list(batch) for batch in step] for step in self._steps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = [[(tuple(a), dict(k)) for a, k in step] for step in state["recent"]]
