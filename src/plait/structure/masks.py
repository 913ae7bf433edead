"""`Masks`: units of a model switched off, exactly as if they were not there.

A mask multiplies what *reads* the units. Where they are written it would not do: an activation
may make something of 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter.site import ConvSite, first_input, make_site
from plait.structure.groups import Structure


class Masks:
    """Hooks on the layers that read masked units. Use as a context, or `close()` it.

    kept: {group: which of its units are on, bool [size]}; `set` changes them.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, kept: Mapping[str, Tensor] | None = None
    ) -> None:
        self.model, self.structure = model, structure
        self.kept: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._handles: dict[str, Any] = {}
        self.set(kept or {})

    def set(self, kept: Mapping[str, Tensor]) -> None:
        """Replace the masks of these groups; the others stay."""
        self.kept |= {name: units.detach().to("cpu", torch.bool) for name, units in kept.items()}
        found: dict[str, Tensor] = {}
        for name, units in self.kept.items():
            for slot in self.structure.groups[name].readers:
                mask = slot.spread(units).float()
                found[slot.module] = found[slot.module] * mask if slot.module in found else mask
        self._inputs = found
        for path in found.keys() - self._handles.keys():
            module = self.model.get_submodule(path)
            hook = self._hook(path, isinstance(make_site(path, module), ConvSite))
            self._handles[path] = module.register_forward_pre_hook(hook, with_kwargs=True)

    def _hook(self, path: str, conv: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            x = first_input(args, kwargs)
            mask = self._inputs[path] = self._inputs[path].to(x.device)
            wide = mask.to(x.dtype)
            if conv:
                wide = wide.reshape(-1, *[1] * (len(module.weight.shape) - 2))  # type: ignore[arg-type]
            y = x * wide
            if args:
                return (y, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): y}

        return hook

    def close(self) -> None:
        """Switch every unit on again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self.kept.clear()

    def __enter__(self) -> Masks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
