"""What an adapter may carry beside its method's deltas: whole modules and single parameters.

A task head trained with the adapter (`attach(..., train_modules=["score"])`, `modules_to_save` in
PEFT) is a `ReplacementDelta`: its own copy of the module's tensors, with which the module runs
while the adapter is active. A bias trained along is a `ParameterDelta`: dW added to the tensor of
that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from plait.adapter.adapter import Adapter
from plait.adapter.delta import Build, Delta, Options, Traits
from plait.adapter.site import ModuleSite, ParameterSite, Site, base_class
from plait.adapter.targets import base_modules, block_width
from plait.errors import unknown


class ReplacementDelta(Delta):
    """A module's own tensors instead of the base's; everything else of the module is the base's.

    `site.details["tensors"]` names them: {name in the module: {"shape", "dtype", "trained"}}.
    """

    kinds = frozenset({"module"})
    traits = Traits(linear_in_x=False, edits_base=True)

    def build(self) -> None:
        for name, facts in self.site.details["tensors"].items():
            dtype = getattr(torch, facts["dtype"])
            make = self.parameter if facts["trained"] else self.frozen
            make(_local(name), *facts["shape"], dtype=dtype)

    def reset(self) -> None:
        self.fill(self.site.base.state_dict())

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in the tensors, by their names in the module."""
        with torch.no_grad():
            for name, own in self.tensors().items():
                own.copy_(tensors[name])

    def tensors(self) -> dict[str, Tensor]:
        """{name in the module: tensor}."""
        own = dict(self.own_tensors())
        return {name: own[_local(name)] for name in self.site.details["tensors"]}

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        module = self.site.base
        base = {n: t.dtype for n, t in module.state_dict().items()}
        mine = {f"module.{n}": t.to(base[n]) for n, t in self.tensors().items()}
        return functional_call(_BaseCall(module), mine, args, kwargs)


class ParameterDelta(Delta):
    """A dense change of one parameter (a bias, a norm), in that parameter's shape."""

    kinds = frozenset({"parameter"})

    def build(self) -> None:
        self.parameter("change", *self.site.shape)

    def dense(self) -> Tensor:
        return self.get_parameter("change")


EXTRAS: dict[str, type[Delta]] = {c.__name__: c for c in (ReplacementDelta, ParameterDelta)}
"""Delta classes that any adapter may hold, whatever its method."""


def is_extra(delta: Delta) -> bool:
    return isinstance(delta, tuple(EXTRAS.values()))


class _BaseCall(nn.Module):
    """Runs a module's base forward, so that `functional_call` does not come back to the delta."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return base_class(self.module).forward(self.module, *args, **kwargs)


def _local(name: str) -> str:
    # Modules take no dots in the names of their tensors, nor a name (`bias`) that is a method's.
    return "module:" + name.replace(".", ":")


def find_modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules with these paths, or endings of paths; a name without one is an error."""
    modules = {path: module for path, module in base_modules(model) if path}
    found: dict[str, nn.Module] = {}
    for name in names:
        hits = {p: m for p, m in modules.items() if p == name or p.endswith("." + name)}
        if not hits:
            raise unknown("module", name, {p.rpartition(".")[2] for p in modules})
        found |= hits
    return found


def add_replacement(
    adapter: Adapter, path: str, tensors: Mapping[str, Tensor], module: nn.Module | None, width: int
) -> ReplacementDelta:
    """A ReplacementDelta at `path` in an adapter that is not installed yet, holding `tensors`."""
    facts = {
        name: {
            "shape": tuple(t.shape),
            "dtype": str(t.dtype).removeprefix("torch."),
            "trained": isinstance(t, nn.Parameter) and t.is_floating_point(),
        }
        for name, t in tensors.items()
    }
    delta = _add(adapter, ReplacementDelta, ModuleSite(path, (width,), module, {"tensors": facts}))
    delta.fill(tensors)
    return delta


def add_parameter(adapter: Adapter, path: str, change: Tensor, module: nn.Module | None) -> None:
    """A ParameterDelta at `path` in an adapter that is not installed yet."""
    delta = _add(adapter, ParameterDelta, ParameterSite(path, tuple(change.shape), module))
    with torch.no_grad():
        delta.get_parameter("change").copy_(change)


def add_modules(adapter: Adapter, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Let the adapter carry (and train) its own copy of these modules of `model`."""
    for path, module in modules.items():
        tensors = module.state_dict(keep_vars=True)
        add_replacement(adapter, path, tensors, module, block_width(model, module))


def _add(adapter: Adapter, cls: type[Any], site: Site) -> Any:
    device = site.device if site.module is not None else torch.device("cpu")
    build = Build(adapter.seed, adapter.shared, adapter.shared.dtype, device)
    adapter.deltas[site.path] = delta = cls(site, Options(), build)
    return delta
