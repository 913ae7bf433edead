"""What a model remembers about its adapters: one plain object on the root module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from plait.adapter.adapted import HiddenModules
from plait.adapter.adapter import Adapter
from plait.adapter.context import Context
from plait.adapter.targets import SHARED_CHILD
from plait.errors import PlaitError, unknown

_KEY = "_plait"


@dataclass(eq=False)
class ModelState:
    """The adapters of one model: which are there, which are active, what was frozen or fused."""

    model: nn.Module
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: dict[str, Any] = field(default_factory=dict)  # {name: weight, or weights by site}
    context: Context = field(default_factory=Context)
    trained_base: list[nn.Parameter] = field(default_factory=list)
    """Base parameters that `attach` froze; detaching the last adapter lets them train again."""
    fused: dict[str, Any] | None = None
    installed: list[tuple[nn.Module, Any]] = field(default_factory=list)
    """The plans that modules run now."""
    plans: dict[Any, list[tuple[nn.Module, Any]]] = field(default_factory=dict)
    """Plans of earlier choices of adapters, so that switching back costs nothing."""

    def adapter(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise unknown("adapter", name, self.adapters)
        return self.adapters[name]


def find_state(model: nn.Module) -> ModelState | None:
    state = model.__dict__.get(_KEY)
    if state is None and hasattr(model, "module") and isinstance(model.module, nn.Module):
        return find_state(model.module)  # DistributedDataParallel keeps the model in `.module`
    return state


def get_state(model: nn.Module) -> ModelState:
    """The model's state; an error when nothing is attached."""
    state = find_state(model)
    if state is None:
        raise PlaitError(f"this {type(model).__name__} has no adapters; call plait.attach first.")
    return state


def make_state(model: nn.Module) -> ModelState:
    state = find_state(model)
    if state is None:
        state = ModelState(model)
        model.__dict__[_KEY] = state
        model.add_module(SHARED_CHILD, HiddenModules())
    return state


def drop_state(model: nn.Module) -> None:
    state = model.__dict__.pop(_KEY)
    for parameter in state.trained_base:
        parameter.requires_grad_(True)
    del model._modules[SHARED_CHILD]


def shared_store(model: nn.Module) -> HiddenModules:
    return model._modules[SHARED_CHILD]  # type: ignore[return-value]
