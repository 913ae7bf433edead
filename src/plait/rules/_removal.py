"""Taking single sites out of an attached adapter, as if it had never had them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from plait.adapter import Adapter, activate
from plait.adapter.adapted import delta_key, deltas_of, release_module
from plait.errors import PlaitError


def shares_tensors(adapter: Adapter) -> bool:
    """Whether some tensors belong to several sites, whose number they may be made for."""
    shared = adapter.shared
    return bool(shared.state_dict() or shared.seeded() or shared.notes)


def remove_sites(adapter: Adapter, paths: Collection[str]) -> None:
    """Remove the deltas at `paths`; the base alone answers there.

    Raises PlaitError where nothing would be left, or where sites share tensors.
    """
    if shares_tensors(adapter) or not set(adapter.deltas) - set(paths) or adapter.state is None:
        raise PlaitError(
            f"adapter {adapter.name!r}: sites can be removed while it is attached, shares no "
            "tensors between sites, and keeps some."
        )
    state = adapter.state
    active = dict(state.active)
    activate(state.model, {n: w for n, w in active.items() if n != adapter.name})
    for path in paths:
        _remove(adapter, path)
    state.plans.clear()
    if adapter.name in active:
        active[adapter.name] = _without(active[adapter.name], paths)
    activate(state.model, active)


def _remove(adapter: Adapter, path: str) -> None:
    delta = adapter.deltas.pop(path)
    module = delta.site.base
    store = deltas_of(module)
    del store[delta_key(adapter.name, path, delta.site.kind)]
    if len(store) == 0:
        release_module(module)
    delta.site = delta.site.bare()


def _without(weight: Any, paths: Collection[str]) -> Any:
    if not isinstance(weight, Mapping):
        return weight
    return {path: w for path, w in weight.items() if path not in paths}
