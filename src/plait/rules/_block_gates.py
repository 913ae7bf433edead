"""One gate per transformer block: the factor on what the trained adapters add at its sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from plait.adapter import Adapter, Delta, Run, activate, block_index
from plait.adapter.state import get_state
from plait.errors import PlaitError


class BlockGates:
    """The blocks in which `run`'s adapters act; what lies outside all blocks keeps its weight."""

    def __init__(self, run: Run) -> None:
        self.model, self.adapters = run.model, run.adapters
        self._before = dict(get_state(run.model).active)
        self.deltas: dict[int, list[Delta]] = {}
        self._places: list[tuple[Adapter, str, int]] = []
        for adapter in run.adapters:
            for path, delta in adapter.deltas.items():
                if (index := block_index(path)) is not None:
                    self.deltas.setdefault(index, []).append(delta)
                    self._places.append((adapter, path, index))
        self.blocks = sorted(self.deltas)
        """Indices of the blocks, in the order of the gates."""

    def set(self, gates: Sequence[float | Tensor]) -> None:
        """Multiply what each block's sites add by its gate; at 0 a site costs nothing."""
        gate = dict(zip(self.blocks, gates, strict=True))
        weights: dict[str, Any] = dict(self._before)
        for adapter in self.adapters:
            weights[adapter.name] = dict(_by_site(self._before[adapter.name], adapter))
        for adapter, path, index in self._places:
            was = weights[adapter.name][path]
            weights[adapter.name][path] = gate[index] if was == 1 else was * gate[index]
        activate(self.model, weights)
        # A router at a gate of 0 runs no more: what it left of its last pass must not stay a loss.
        get_state(self.model).context.clear()

    def clear(self) -> None:
        """The weights from before."""
        activate(self.model, self._before)


def _by_site(weight: Any, adapter: Adapter) -> Mapping[str, Any]:
    if isinstance(weight, Mapping):
        return {path: weight.get(path, 1.0) for path in adapter.deltas}
    return dict.fromkeys(adapter.deltas, weight)


def check_gates(run: Run, rule: str) -> None:
    """PlaitError unless the adapters act additively in at least two blocks."""
    found = {block_index(path) for a in run.adapters for path in a.deltas} - {None}
    if len(found) < 2:
        raise PlaitError(
            f"{rule}: the adapters have sites in {len(found)} transformer blocks, and there is "
            "nothing to choose from; choose `targets` in several blocks."
        )
    for adapter in run.adapters:
        if any(d.traits.edits_base for d in adapter.deltas.values()):
            raise PlaitError(
                f"{rule}: adapter {adapter.name!r} ({adapter.method.name}) rewrites base weights, "
                "which have no gates; use a method that adds to the output."
            )
