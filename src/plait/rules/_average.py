"""Averages of what a run trains, beside it: for the adapter at the end, or for what compares.

Factors are averaged, not the changes that they make: mean(B) mean(A) is near mean(B A) along one
run, whose factors share a basis, and means nothing between two runs (merge those).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter import Rule, Run
from plait.errors import PlaitError, unknown
from plait.rules._forwards import holding

Space = Literal["factor", "delta"]


class AveragingRule(Rule):
    """A rule that keeps an average of all trained tensors; `_values` gives it, or None yet."""

    use: str
    keeps_shapes = True

    def setup(self, run: Run) -> None:
        super().setup(run)
        named = [(a.name, n, p) for a in run.adapters for n, p in a.named_parameters()]
        self._places = [(adapter, name) for adapter, name, _ in named]
        self._parameters = [p for *_, p in named]

    def _values(self) -> Sequence[Tensor] | None:
        raise NotImplementedError

    def _average(self) -> Sequence[Tensor]:
        if (found := self._values()) is None:
            raise PlaitError(
                f"rule {type(self).__name__} has no average at step {self.run.step}; let it start "
                "earlier."
            )
        return found

    def average(self, adapter: str | None = None) -> dict[str, Tensor]:
        """The adapter's state dict with the averages in it, in float32 or wider.

        `adapter` may be left out where only one trains. Raises PlaitError before the first average.
        """
        by_name = {a.name: a for a in self.run.adapters}
        name = next(iter(by_name)) if adapter is None and len(by_name) == 1 else adapter
        if name not in by_name:
            raise unknown("adapter", str(name), by_name, where=type(self).__name__)
        found = {
            n: value.detach().clone()
            for (owner, n), value in zip(self._places, self._average(), strict=True)
            if owner == name
        }
        return {**by_name[name].state_dict(), **found}

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block the adapters answer with the averages: `with rule.averaged(): ...`."""
        return holding(self._parameters, self._average())

    def finish(self) -> None:
        if self.use == "at_finish" and self._values() is not None:
            self.take_over()

    @torch.no_grad()
    def take_over(self) -> None:
        """Write the averages into the adapters."""
        for parameter, value in zip(self._parameters, self._average(), strict=True):
            parameter.copy_(value)

    def _named(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        return {
            f"{a}/{n}": v.detach().clone() for (a, n), v in zip(self._places, values, strict=True)
        }

    def _ordered(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Saved tensors in the order of the parameters, on their devices."""
        places = zip(self._places, self._parameters, strict=True)
        return [values[f"{a}/{n}"].to(p.device) for (a, n), p in places]


def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in float32 or wider."""
    wide = [torch.promote_types(t.dtype, torch.float32) for t in tensors]
    return [t.detach().to(d, copy=True) for t, d in zip(tensors, wide, strict=True)]


def move_average(average: list[Tensor], parameters: Sequence[Tensor], share: float) -> None:
    """average += share (parameters - average), in place and in the average's dtypes."""
    pairs = zip(parameters, average, strict=True)
    torch._foreach_lerp_(average, [p.detach().to(a.dtype) for p, a in pairs], share)


def interpolate(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float, space: Space = "factor"
) -> dict[str, Tensor]:
    """Between two states of one adapter's kind: `first` at share 0, `second` at 1.

    "factor" interpolates every tensor, which says something for two points of one run. "delta"
    interpolates what pairs A, B do, exactly: it stacks them to rank r_1 + r_2 (for an adapter of
    that rank with the same scaling); every other tensor is interpolated as it is. Two attached
    adapters are interpolated so by `plait.activate(model, {"a": 1 - share, "b": share})`.
    """
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())[0]
        raise PlaitError(f"interpolate: only one of the two states has {odd!r}.")
    pairs = {n[:-1] for n in first if n.endswith(".A") and f"{n[:-1]}B" in first}
    found: dict[str, Any] = {}
    for name, a in first.items():
        b, stem = second[name], name[:-1]
        if space == "delta" and stem in pairs and name.endswith(".A"):
            found[name] = torch.cat([a, b], -2)
        elif space == "delta" and stem in pairs and name.endswith(".B"):
            found[name] = torch.cat([(1 - share) * a, share * b], -1)
        else:
            found[name] = torch.lerp(a, b, share)
    return found
