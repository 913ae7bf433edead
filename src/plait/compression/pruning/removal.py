"""Taking units out: weights cut along their dimensions, and adapters cut as their sites are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import Adapter, Site, activate, adapters, detach
from plait.adapter.attaching import bind, install
from plait.adapter.site import ConvSite, EmbeddingSite, TransposedLinearSite
from plait.adapter.state import find_state
from plait.adapter.targets import base_modules
from plait.compression.changes import AdapterChanges, take_apart
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.structure.groups import Indices

Undo = Callable[[], None]


def sliced(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """A tensor with only these indices of its dimensions."""
    for dim, index in dims.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.contiguous()


def cut_tensors(model: nn.Module, indices: Indices) -> list[Undo]:
    """Cut parameters and buffers in place, tied ones wherever they stand, and the sizes that
    torch's own layers keep; returns what undoes it."""
    modules = dict(base_modules(model))
    made: dict[int, Tensor] = {}
    for name, dims in indices.items():
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        old = module._parameters.get(leaf)
        if old is not None:
            made[id(old)] = nn.Parameter(sliced(old.detach(), dims), old.requires_grad)
        else:
            buffer = module.get_buffer(leaf)
            made[id(buffer)] = sliced(buffer, dims)
    undo: list[Undo] = []
    for module in modules.values():
        held: Any
        for held in (module._parameters, module._buffers):
            for leaf, tensor in held.items():
                if id(tensor) in made:
                    undo.append(partial(held.__setitem__, leaf, tensor))
                    held[leaf] = made[id(tensor)]
        undo += set_attributes(module, layer_sizes(module))
    return undo


def set_attributes(module: nn.Module, values: Mapping[str, Any]) -> list[Undo]:
    """Set what differs; returns what undoes it."""
    undo: list[Undo] = []
    for name, value in values.items():
        old = getattr(module, name)
        if old != value:
            undo.append(partial(setattr, module, name, old))
            setattr(module, name, value)
    return undo


def layer_sizes(module: nn.Module) -> dict[str, Any]:
    """The sizes that one of torch's layers keeps beside its weight, as the weight has them."""
    weight = module._parameters.get("weight")
    if weight is None:
        return {}
    shape = weight.shape
    if isinstance(module, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(module, nn.LayerNorm):
        return {"normalized_shape": tuple(shape)}
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return {"out_channels": shape[0], "in_channels": shape[1] * module.groups}
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return {"num_features": shape[0]}
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return {"nx": shape[0], "nf": shape[1]}
    return {}


# -- adapters -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Aside:
    """The adapters of a model, taken off and apart while it is cut."""

    parts: dict[str, AdapterChanges]
    whole: dict[str, Adapter]
    active: dict[str, Any]
    trained: set[str]


def check_adapters(model: nn.Module, indices: Indices) -> dict[str, AdapterChanges]:
    """The model's adapters in parts; PlaitError for one that cannot be cut."""
    found = {name: take_apart(adapter) for name, adapter in adapters(model).items()}
    for name, parts in found.items():
        for path in parts.extras:
            if any(t == path or t.startswith(f"{path}.") for t in indices):
                raise PlaitError(
                    f"adapter {name!r} holds a copy of {path!r}, whose size changes; prune first "
                    "and train it on the smaller model."
                )
    return found


def set_aside(model: nn.Module, parts: dict[str, AdapterChanges]) -> Aside:
    whole = adapters(model)
    state = find_state(model)
    active = dict(state.active) if state is not None else {}
    trained = {n for n, a in whole.items() if any(p.requires_grad for p in a.parameters())}
    if whole:
        detach(model)
    return Aside(parts, whole, active, trained)


def put_back(model: nn.Module, aside: Aside, indices: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Attach the adapters, as plain LoRAs cut as their sites were; {weight: {dim: indices}}."""
    for name, parts in aside.parts.items():
        lows, sites, biases = {}, {}, dict(parts.biases)
        for path, low in parts.lows.items():
            rows, columns = _canonical(parts.sites[path], indices.get(f"{path}.weight", {}))
            lows[path] = _cut_low(low, rows, columns)
            sites[path] = _cut_site(parts.sites[path], lows[path])
            if path in biases and rows is not None:
                biases[path] = biases[path].index_select(0, rows)
        smaller = dataclasses.replace(parts, sites=sites, biases=biases)
        adapter = smaller.rebuilt(lows, name)
        install(model, bind(adapter, model), activate=False, train=name in aside.trained)
    if aside.parts:
        activate(model, aside.active)


def restore(model: nn.Module, aside: Aside) -> None:
    """Attach the adapters as they were."""
    for name, adapter in aside.whole.items():
        install(model, bind(adapter, model), activate=False, train=name in aside.trained)
    if aside.whole:
        activate(model, aside.active)


def _canonical(site: Site, dims: Mapping[int, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Indices of the rows and columns of W [out, in]."""
    if isinstance(site, TransposedLinearSite | EmbeddingSite):
        return dims.get(1), dims.get(0)
    columns = dims.get(1)
    if isinstance(site, ConvSite) and columns is not None:
        taps = torch.Size(site.details["kernel"][1:]).numel()
        columns = (columns[:, None] * taps + torch.arange(taps)).flatten()
    return dims.get(0), columns


def _cut_low(low: LowRank, rows: Tensor | None, columns: Tensor | None) -> LowRank:
    B = low.B if rows is None else low.B.index_select(-2, rows)
    A = low.A if columns is None else low.A.index_select(-1, columns)
    return LowRank(B, A, low.scale)


def _cut_site(site: Site, low: LowRank) -> Site:
    shape = (*site.shape[:-2], *low.shape[-2:])
    details = dict(site.details)
    if isinstance(site, ConvSite):
        _, *taps = details["kernel"]
        details["kernel"] = (shape[-1] // torch.Size(taps).numel(), *taps)
    return dataclasses.replace(site, shape=shape, details=details)
