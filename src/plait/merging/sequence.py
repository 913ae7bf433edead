"""Merges that take their inputs one after the other and hold only what they have made of them.

A driver that reads inputs from disk asks for one at a time, so that memory does not grow with their
number; in memory the same steps run over what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from plait.merging.changes import Changes
from plait.merging.method import Merge


class SequentialMerge(Merge):
    """Subclasses say `begin`, `arrive` and `end`, and the same in factors (`merge`)."""

    spaces = ("factors", "delta")

    def begin(self, count: int) -> Any:
        """What is merged before the first of `count` inputs."""
        raise NotImplementedError

    def arrive(self, so_far: Any, change: Tensor, weight: float) -> Any:
        """What is merged after one more change [out, in]."""
        raise NotImplementedError

    def end(self, so_far: Any, change: Tensor) -> Tensor:
        """The merge [out, in], of the shape and type of any of the changes."""
        raise NotImplementedError

    def one_by_one(
        self,
        changes: Changes,
        weights: Sequence[float],
        look: Callable[[Tensor], None] = lambda change: None,
    ) -> Tensor:
        """The merge [out, in] of changes asked for in turn, each once; `look` sees each."""
        so_far = self.begin(changes.k)
        for index, weight in enumerate(weights):
            change = changes.whole(index)
            look(change)
            so_far = self.arrive(so_far, change, weight)
        return self.end(so_far, change)

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        return self.one_by_one(changes, weights.flatten().tolist())

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        merged: Tensor = found[rows.start : rows.stop]
        return merged
