"""`find_structure`: run the model once, follow the axes of its weights, collect the groups."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from plait.adapter.site import ConvSite, EmbeddingSite, LinearSite, TransposedLinearSite, make_site
from plait.adapter.targets import base_modules
from plait.errors import PlaitError
from plait.statistics.frozen import frozen, to_device
from plait.structure import products, reshaping  # noqa: F401 (loaded, they register their rules)
from plait.structure.axes import Axis, Dim, dim, hold, leaves
from plait.structure.groups import Group, Slot, Structure
from plait.structure.spread import CONSTANT, Call, Dims, spread, touched


@torch.no_grad()
def find_structure(model: nn.Module, batch: Mapping[str, Any] | None = None) -> Structure:
    """The groups of units of a model, found by running it on one batch.

    Args:
        model: any module; its adapters are left out. Parameters, and buffers of numbers that it
            saves, are followed through views, products, attention, norms and whatever works entry
            by entry.
        batch: keyword arguments for the model, small ones; None takes a few tokens, for a model of
            transformers.

    What cannot be followed (an axis that an unknown operation, an index or a constant meets, or
    the width of an output) is in no group, and `refused` says why. Raises PlaitError where the
    model does not run on the batch.
    """
    named = dict(_tensors(model))
    tracer = Tracer()
    for tensor in named.values():
        tracer.weight(tensor)
    given: dict[str, Any] = dict(batch) if batch is not None else example(model)
    given.pop("labels", None)  # a loss looks at the outputs, whose width is held anyway
    if getattr(getattr(model, "config", None), "use_cache", None) is not None:
        given["use_cache"] = False  # what a cache keeps would count as an output
    with frozen(model) as device:
        try:
            with tracer:
                out = model(**to_device(given, device))
        except PlaitError:
            raise
        except Exception as e:
            cause = " ".join(str(e).split())[:200]
            raise PlaitError(f"{type(model).__name__} does not run on this batch: {cause}") from e
    for tensor in _results(out):
        hold(touched(tracer.dims(tensor)), "it is the width of an output")
    return _structure(model, {name: tracer.dims(t) for name, t in named.items()})


def example(model: nn.Module) -> dict[str, Any]:
    """A few tokens, for a model that takes them."""
    config: Any = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        raise PlaitError(
            f"{type(model).__name__} does not say what it reads; pass data=, batches for "
            "model(**batch)."
        )
    return {"input_ids": torch.arange(2 * 5).reshape(2, 5) % size}


class Tracer(TorchDispatchMode):
    """Remembers the dimensions of every tensor that lives, and spreads them as operations run."""

    def __init__(self) -> None:
        super().__init__()
        self._dims: dict[int, tuple[weakref.ref[Tensor], Dims]] = {}
        self._weights: set[int] = set()
        self._copies: list[Tensor] = []

    def label(self, tensor: Tensor, dims: Dims) -> None:
        self._dims[id(tensor)] = weakref.ref(tensor), dims

    def weight(self, tensor: Tensor) -> None:
        """Follow a tensor of the model, every dimension an axis of its own."""
        self.label(tensor, [dim(n) for n in tensor.shape])
        self._weights.add(tensor.untyped_storage().data_ptr())

    def copied(self, tensor: Tensor) -> None:
        """A weight in another precision; kept, so that its memory cannot become something else."""
        self._weights.add(tensor.untyped_storage().data_ptr())
        self._copies.append(tensor)

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether it is a weight, or a view of one."""
        return tensor.untyped_storage().data_ptr() in self._weights

    def dims(self, tensor: Tensor) -> Dims:
        found = self._dims.get(id(tensor))
        if found is None or found[0]() is not tensor:
            self.label(tensor, [dim(n, CONSTANT) for n in tensor.shape])
            found = self._dims[id(tensor)]
        return found[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        spread(func, Call(self, func.overloadpacket.__name__, args, kwargs or {}, out))
        return out


# -- from axes to groups --------------------------------------------------------------------------


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers of numbers of the base, by name; a shared one once."""
    seen: set[int] = set()
    for path, module in base_modules(model):
        saved = {n: b for n, b in module._buffers.items() if _saved(module, n, b)}
        for name, tensor in {**module._parameters, **saved}.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield (f"{path}.{name}" if path else name), tensor


def _saved(module: nn.Module, name: str, buffer: Tensor | None) -> bool:
    lasts = name not in module._non_persistent_buffers_set
    return lasts and buffer is not None and buffer.is_floating_point()


def _results(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from _results(value)
    elif isinstance(out, list | tuple):
        for value in out:
            yield from _results(value)


def _structure(model: nn.Module, dims: Mapping[str, Dims]) -> Structure:
    slots: dict[Axis, list[Slot]] = {}
    inside: set[Axis] = set()
    refused: dict[str, str] = {}
    readers = _readers(model)
    for name, axes_of in dims.items():
        for place, axes in enumerate(axes_of):
            found = leaves(axes)
            free = [axis for axis in found if not axis.held]
            for slot, axis in _slots(name, place, found, place == readers.get(name)):
                if not axis.held:
                    slots.setdefault(axis, []).append(slot)
            inside |= set(free[1:])
            if found and not free:
                refused[f"{name}[{place}]"] = found[0].held
    groups: dict[str, Group] = {}
    for axis, places in slots.items():
        if all(s.reads for s in places) or not any(s.reads for s in places):
            why = "nothing in the model reads it" if not places[0].reads else "nothing writes it"
            refused |= {f"{s.tensor}[{s.dim}]": why for s in places}
            continue
        name = _free_name(_common(places), groups)
        whole = axis not in inside
        groups[name] = Group(name, axis.size, tuple(places), whole, axis.mixed)
    return Structure(groups, refused)


def _slots(name: str, place: int, found: Dim, reads: bool) -> Iterator[tuple[Slot, Axis]]:
    whole = 1
    for axis in found:
        whole *= axis.size
    before = 1
    for axis in found:
        yield Slot(name, place, before, whole // (before * axis.size), reads), axis
        before *= axis.size


def _readers(model: nn.Module) -> dict[str, int]:
    """{name of a weight: the dimension on which its layer's inputs lie}."""
    found = {}
    for path, module in base_modules(model):
        site = make_site(path, module)
        if isinstance(site, TransposedLinearSite):
            found[f"{path}.weight"] = 0
        elif isinstance(site, LinearSite | ConvSite) and not isinstance(site, EmbeddingSite):
            found[f"{path}.weight"] = 1
    return found


def _common(slots: list[Slot]) -> str:
    """The path of the smallest module that holds all slots; a layer's own where that is the
    model."""
    parts = [slot.module.split(".") for slot in slots]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared) or slots[0].tensor


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    if name not in taken:
        return name
    return next(n for i in range(2, len(taken) + 3) if (n := f"{name}:{i}") not in taken)
