"""Choosing which adapters are active."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from plait.adapter.adapter import Adapter
from plait.adapter.delta import Delta
from plait.adapter.plans import Fused, choose_plan
from plait.adapter.siblings import link_siblings
from plait.adapter.state import ModelState, find_state, get_state
from plait.adapter.weighting import Weight, check_weight, is_number
from plait.errors import PlaitError, unknown

_KEPT_PLANS = 64


Weights = Weight | Mapping[str, Weight]
"""One weight for a whole adapter, or {site path: weight}; a site that is not named has weight 1."""


def activate(model: nn.Module, adapters: str | Sequence[str] | Mapping[str, Weights]) -> None:
    """Choose the active adapters: a name, several, or `{name: weight}`; `{}` is the base model.

    The adapted output is base + sum of weight x change; a weight may be a tensor with a gradient,
    and a mapping gives sites weights of their own: `{name: {"layers.0.up_proj": 0.5}}`, a tensor
    [out, 1] or [1, in] each row or column of a site's dW (see `plait.adapter.weighting`).
    Which adapters train is another matter (`adapter.requires_grad_`). The cost does not depend on
    what else is attached, and switching back to an earlier choice is a matter of microseconds.
    """
    if isinstance(adapters, str):
        adapters = [adapters]
    if not isinstance(adapters, Mapping):
        adapters = dict.fromkeys(adapters, 1.0)
    if find_state(model) is not None or adapters:
        set_active(model, adapters)


def set_active(model: nn.Module, adapters: Mapping[str, Weights]) -> None:
    state = get_state(model)
    refuse_fused(state, "activate")
    chosen = {name: state.adapter(name) for name in adapters}
    _check_weights(chosen, adapters)
    _check_edits(chosen, adapters)
    before = list(state.active)
    for name in before:
        if name not in adapters:
            _notify(state.adapter(name), on=False)
    for name, adapter in chosen.items():
        if name not in before:
            _notify(adapter, on=True)
    state.active = dict(adapters)
    install_plans(state, _plans(state))


def install_plans(state: ModelState, plans: list[tuple[nn.Module, Any]]) -> None:
    """Make these the plans of the model; modules that are not among them run the base alone."""
    for module, _ in state.installed:
        module.__dict__["_plait_plan"] = None
    for module, plan in plans:
        module.__dict__["_plait_plan"] = plan
    state.installed = plans


def _plans(state: ModelState) -> list[tuple[nn.Module, Any]]:
    """The plans of what is active; those of plain choices are kept for the next time."""
    weights = list(state.active.items())
    plain = not any(isinstance(weight, Tensor | Mapping) for _, weight in weights)
    key = tuple(weights) if plain else None
    if key is not None and key in state.plans:
        return state.plans[key]
    plans = [(m, choose_plan(m, entries)) for m, entries in entries_by_module(state)]
    link_siblings(plan for _, plan in plans if isinstance(plan, Fused))
    if key is not None:
        if len(state.plans) >= _KEPT_PLANS:
            state.plans.clear()
        state.plans[key] = plans
    return plans


def entries_by_module(state: ModelState) -> list[tuple[nn.Module, list[tuple[Delta, Weight]]]]:
    """Every module that something active acts on, with its deltas and their weights."""
    found: dict[nn.Module, list[tuple[Delta, Weight]]] = {}
    for name, weight in state.active.items():
        for path, delta in state.adapters[name].deltas.items():
            here = weight.get(path, 1.0) if isinstance(weight, Mapping) else weight
            found.setdefault(delta.site.base, []).append((delta, here))
    return list(found.items())


def _notify(adapter: Adapter, on: bool) -> None:
    for delta in adapter.deltas.values():
        if delta.traits.edits_base:
            delta.activated() if on else delta.deactivated()


@contextlib.contextmanager
def base_weights(model: nn.Module) -> Iterator[None]:
    """Within the block W is the base's own, whichever active adapter rewrites it.

    What another adapter derives from W (singular vectors, a start) must not see those edits, and
    other rows of a batch must not run through them.
    """
    state = find_state(model)
    active = [] if state is None else [state.adapters[name] for name in state.active]
    for adapter in active:
        _notify(adapter, on=False)
    try:
        yield
    finally:
        # What was active may have been replaced meanwhile: only what still is gets W back.
        for adapter in active:
            if state is not None and adapter.name in state.active:
                _notify(adapter, on=True)


def _check_weights(chosen: Mapping[str, Adapter], weights: Mapping[str, Weights]) -> None:
    for name, adapter in chosen.items():
        weight = weights[name]
        if not isinstance(weight, Mapping):
            weight = {} if is_number(weight) else dict.fromkeys(adapter.deltas, weight)
        for path, here in weight.items():
            if path not in adapter.deltas:
                raise unknown("site", path, adapter.deltas, where=f"adapter {name!r}")
            check_weight(adapter.deltas[path], here)


def _check_edits(chosen: Mapping[str, Adapter], weights: Mapping[str, Weights]) -> None:
    for name, adapter in chosen.items():
        if not any(d.traits.edits_base for d in adapter.deltas.values()):
            continue
        weight = weights[name]
        if len(chosen) > 1 or isinstance(weight, Tensor | Mapping) or weight != 1:
            raise PlaitError(
                f"adapter {name!r} ({adapter.method.name}) rewrites base weights while active, so "
                "it must be active alone and at weight 1; convert it with to_lora() to combine it."
            )


def refuse_fused(state: ModelState, verb: str) -> None:
    if state.fused is not None:
        raise PlaitError(f"adapters are fused into the weights; plait.unfuse(model) before {verb}.")
