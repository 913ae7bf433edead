"""The base's weights beside an adapter: a loaded model's, or a checkpoint's, one site at a time."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from plait.adapter import Delta, Site
from plait.adapter.site import make_site

if TYPE_CHECKING:
    from plait.compression.weights import Places, Weights

Base = nn.Module | str | os.PathLike[str]
"""A model, or the folder of its checkpoint (config.json and safetensors)."""


class BaseWeights:
    """What a base answers: its label, its fingerprint, and the shape and weight of a site.

    `model` is its structure, without numbers where the base is a checkpoint's folder.
    """

    def __init__(
        self, label: str, fingerprint: str | None, places: Any, model: nn.Module | None
    ) -> None:
        self.label, self.fingerprint, self.model = label, fingerprint, model
        self._places: _Modules | _Tensors = places

    def shape(self, path: str) -> tuple[int, ...] | None:
        """The canonical shape of W there, None where the base has nothing of that path."""
        return self._places.shape(path)

    def holds(self, path: str) -> bool:
        """Whether a weight or a module of that path is in the base."""
        return self._places.shape(path) is not None or path in self._places.modules

    def weight(self, site: Site) -> Tensor | None:
        """W [out, in] in canonical orientation, read now; None where there is none that fits."""
        shape = self.shape(site.path)
        if shape != tuple(site.shape) or site.kind == "module":
            return None
        return self._places.weight(site)

    def placed(self, delta: Delta) -> Delta:
        """The same change where it can see its weight: a copy that shares its tensors."""
        if delta.site.module is not None:
            return delta
        weight = self._places.module(delta.site) if self.holds(delta.site.path) else None
        if weight is None:
            return delta
        probe = copy.copy(delta)
        probe.__dict__.update(
            _buffers=dict(delta._buffers),
            _non_persistent_buffers_set=set(delta._non_persistent_buffers_set),
            site=dataclasses.replace(delta.site, module=weight),
        )
        with torch.no_grad():
            probe.attached()
        return probe


class _Modules:
    """The modules of a model that is loaded."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: Mapping[str, nn.Module] = dict(model.named_modules())
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    def shape(self, path: str) -> tuple[int, ...] | None:
        if path in self._parameters:
            return tuple(self._parameters[path].shape)
        site = make_site(path, self.modules[path]) if path in self.modules else None
        return None if site is None else tuple(site.shape)

    def module(self, site: Site) -> nn.Module | None:
        owner = site.path.rpartition(".")[0] if site.kind == "parameter" else site.path
        return self.modules.get(owner)

    def weight(self, site: Site) -> Tensor:
        return dataclasses.replace(site, module=self.module(site)).weight().detach()


class _Tensors:
    """The tensors of a checkpoint: read when asked for, none kept."""

    def __init__(self, weights: Weights, places: Places, model: nn.Module | None) -> None:
        self._weights = weights
        self._names: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in weights.shapes.items():
            for site in places.sites(name, shape):
                self._names[site.path] = self._names[name] = name
                self._shapes[site.path] = tuple(site.shape)
                self._shapes.setdefault(name, shape)
        self.modules: Mapping[str, object] = {} if model is None else dict(model.named_modules())

    def shape(self, path: str) -> tuple[int, ...] | None:
        return self._shapes.get(path)

    def module(self, site: Site) -> nn.Module | None:
        """A stand-in that holds this site's tensor and nothing else."""
        if site.path not in self._names:
            return None
        leaf = site.path.rpartition(".")[2] if site.kind == "parameter" else "weight"
        holder = nn.Module()
        stored = nn.Parameter(self._weights.read(self._names[site.path]), requires_grad=False)
        holder.register_parameter(leaf, stored)
        return holder

    def weight(self, site: Site) -> Tensor:
        return dataclasses.replace(site, module=self.module(site)).weight().detach()


@contextlib.contextmanager
def open_base(base: Base | None) -> Iterator[BaseWeights | None]:
    """The weights of a model, or of a checkpoint's folder; its files are closed at the end.

    Raises FormatError for a folder without safetensors.
    """
    if base is None:
        yield None
        return
    fingerprint = _fingerprint(base)
    if isinstance(base, nn.Module):
        label = str(getattr(getattr(base, "config", None), "name_or_path", "") or "the model")
        yield BaseWeights(label, fingerprint, _Modules(base), base)
        return
    from plait.compression.weights import Places, open_weights, skeleton

    folder = Path(base)
    with open_weights(folder, str(folder)) as weights:
        model = skeleton(folder)
        tensors = _Tensors(weights, Places(model), model)
        yield BaseWeights(str(folder), fingerprint, tensors, model)


def _fingerprint(base: Base) -> str | None:
    from plait.training.fingerprint import fingerprint

    try:
        return fingerprint(base)
    except (ValueError, AttributeError, OSError):
        return None  # no transformers model, or one without the usual weights
