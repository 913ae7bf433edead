"""How a module comes to apply deltas without being wrapped.

`adapt_module` gives a module a cached subclass of its own class, `AdaptedLinear(Adapted, Linear)`,
and one child that holds the deltas by adapter name. Name, place, `isinstance`, hooks, parameters
and the base's state-dict keys stay what they were; deepcopy and pickle work; the last
`release_module` puts the class back. (torch.nn.utils.parametrize and FSDP2 do the same.)
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn

from plait.adapter.site import base_class
from plait.adapter.targets import ADAPTER_CHILD
from plait.errors import PlaitError

Plan = Callable[..., Any]


class HiddenModules(nn.ModuleDict):
    """A ModuleDict that takes no part in state dicts: the base's keys stay the base's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_forget_missing)

    def forward(self, x: Any) -> Any:
        """The identity: nn.Sequential runs every child in turn, and this must not be a step."""
        return x

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        return super().state_dict() if destination is None and not args else destination


def _forget_missing(module: nn.Module, keys: Any) -> None:
    hidden = (f"{ADAPTER_CHILD}.", "plait_shared.")
    keys.missing_keys[:] = [k for k in keys.missing_keys if not any(h in k for h in hidden)]


class Adapted(nn.Module):
    """Mixin of every module that carries deltas. `_plait_plan` is None while none is active."""

    _plait_base_class: type[nn.Module]
    _plait_plan: Plan | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan = self._plait_plan
        if plan is None:
            return self._plait_base_class.forward(self, *args, **kwargs)
        return plan(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The subclass is made at run time, so pickle and deepcopy must rebuild it from the base's.
        parameters = tuple(getattr(type(self), "_plait_parameters", ()))
        return _rebuild, (self._plait_base_class, parameters), self.__getstate__()


_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[Adapted]] = {}


def adapted_class(cls: type[nn.Module], parameters: tuple[str, ...] = ()) -> type[Adapted]:
    """The cached subclass of `cls`; `parameters` are the names it answers with base + change."""
    key = (cls, parameters)
    if key not in _classes:
        body: dict[str, Any] = {
            "_plait_base_class": cls,
            "_plait_parameters": parameters,
            "__module__": cls.__module__,
            "__doc__": cls.__doc__,
        }
        body |= {name: _live_parameter(name) for name in parameters}
        _classes[key] = type(f"Adapted{cls.__name__}", (Adapted, cls), body)
    return _classes[key]


def _live_parameter(name: str) -> property:
    """`module.<name>` answers base + change while the adapted forward runs, else the base."""

    def get(self: nn.Module) -> Any:
        live = self.__dict__.get("_plait_live")
        return live[name] if live is not None and name in live else self._parameters[name]

    return property(get)


def _rebuild(cls: type[nn.Module], parameters: tuple[str, ...]) -> Adapted:
    new = adapted_class(cls, parameters)
    return new.__new__(new)


def adapt_module(module: nn.Module, parameter: str | None = None) -> HiddenModules:
    """Make `module` an adapted one (idempotent) and return its store of deltas."""
    base = base_class(module)
    have: tuple[str, ...] = getattr(type(module), "_plait_parameters", ())
    names = have if parameter is None or parameter in have else (*have, parameter)
    if ADAPTER_CHILD not in module._modules:
        if hasattr(module, ADAPTER_CHILD):
            raise PlaitError(f"{base.__name__} already has an attribute {ADAPTER_CHILD!r}.")
        module.__dict__["_plait_plan"] = None
        module.__class__ = adapted_class(base, names)
        module.add_module(ADAPTER_CHILD, HiddenModules())
        _redirect_forward(module, base)
    elif names != have:
        module.__class__ = adapted_class(base, names)
    return deltas_of(module)


def _redirect_forward(module: nn.Module, cls: type[nn.Module]) -> None:
    """accelerate shadows `forward` on the instance and calls `_old_forward`: aim that at us."""
    if "forward" not in module.__dict__:
        return
    if "_old_forward" not in module.__dict__:
        raise PlaitError(
            f"a {cls.__name__} has its forward replaced on the instance (by another library); "
            "attach the adapter before that, or undo the replacement first."
        )
    module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)


def release_module(module: nn.Module) -> None:
    """Give the module its own class back (when no delta is left on it)."""
    base = base_class(module)
    del module._modules[ADAPTER_CHILD]
    module.__dict__.pop("_plait_plan", None)
    module.__dict__.pop("_plait_live", None)
    module.__class__ = base
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(base.forward, module)


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module, Adapted)


def deltas_of(module: nn.Module) -> HiddenModules:
    """The deltas on an adapted module; keys are `name` or `name|parameter` (see `delta_key`)."""
    return module._modules[ADAPTER_CHILD]  # type: ignore[return-value]


def delta_key(adapter: str, site_path: str, kind: str) -> str:
    """The key of a delta in its module's store: parameters of one module need one each."""
    return f"{adapter}|{site_path.rpartition('.')[2]}" if kind == "parameter" else adapter
