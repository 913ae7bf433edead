"""`cut`: chosen units taken out of a model and its adapters, checked, or nothing changed at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import Adapter, adapters, detach
from plait.adapter.targets import base_modules
from plait.compression.pruning.removal import (
    Undo,
    check_adapters,
    cut_tensors,
    put_back,
    restore,
    set_aside,
)
from plait.compression.pruning.sizes import (
    Attributes,
    Shapes,
    apply_config,
    fit_attributes,
    fitting_configs,
    shapes_of,
)
from plait.compression.pruning.stored import save_pruned
from plait.errors import PlaitError
from plait.statistics.frozen import to_device
from plait.structure import Masks, Structure

CLOSE = 500
"""Units in the last place, of the greatest answer, by which two ways of rounding may differ."""


@dataclass
class Pruned:
    """A model that lost units, and what is to be known about it."""

    model: nn.Module
    kept: dict[str, list[int]]
    """{group: the units that stayed}, for groups that lost some."""
    before: int
    """Parameters of the base; `after`, what is left of them."""
    after: int
    config: dict[str, int] | None
    """Keys of the configuration that changed: `from_pretrained` reads what is saved. None where no
    configuration says these sizes: `load_pruned` reads it."""
    attributes: Attributes = field(default_factory=dict)
    """Sizes in modules that changed, where no configuration does."""
    left_whole: dict[str, str] = field(default_factory=dict)
    """{group: why nothing was taken from it}."""

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The model's adapters, cut as their sites were; plain LoRAs now."""
        return adapters(self.model)

    def save(self, path: str | Path, tokenizer: Any = None) -> Path:
        """Write the model to a folder, complete or not at all; without its adapters."""
        return save_pruned(self, Path(path), tokenizer)


def cut(
    model: nn.Module, structure: Structure, kept: Mapping[str, Tensor], sample: Mapping[str, Any]
) -> Pruned:
    """Leave of each group only the units `kept` (bool [size]).

    The answers to `sample` must be those of the whole model with the other units switched off
    (where no norm looks at them). Raises PlaitError, with the model as it was, where they are not
    or it does not run.
    """
    kept = {name: units for name, units in kept.items() if not units.all()}
    shapes = shapes_of(model)
    indices = structure.entries(kept, shapes)
    everywhere = by_all_names(model, indices, shapes)
    parts = check_adapters(model, indices)
    exact = not any(structure.groups[name].mixed for name in kept)
    with Masks(model, structure, kept):
        expected = answer(model, sample) if exact else None
    before = count_parameters(model)
    aside = set_aside(model, parts)
    undo = cut_tensors(model, indices)
    try:
        put_back(model, aside, everywhere)
        check = _Check(model, sample, expected)
        config, attributes = _fit(model, shapes, cut_shapes(shapes, everywhere), check, undo)
    except BaseException:
        if adapters(model):
            detach(model)
        for step in reversed(undo):
            step()
        restore(model, aside)
        raise
    stayed = {name: units.nonzero()[:, 0].tolist() for name, units in kept.items()}
    return Pruned(model, stayed, before, count_parameters(model), config, attributes)


def by_all_names(
    model: nn.Module, indices: Mapping[str, Mapping[int, Tensor]], shapes: Shapes
) -> dict[str, Mapping[int, Tensor]]:
    """The same cut under every name that a shared tensor has."""
    first = {id(_tensor(model, name)): name for name in indices}
    found = {name: first.get(id(_tensor(model, name))) for name in shapes}
    return {name: indices[known] for name, known in found.items() if known is not None}


def cut_shapes(shapes: Shapes, indices: Mapping[str, Mapping[int, Tensor]]) -> Shapes:
    """The shapes that a cut leaves."""
    found = dict(shapes)
    for name, dims in indices.items():
        sizes = [len(dims[d]) if d in dims else n for d, n in enumerate(shapes[name])]
        found[name] = torch.Size(sizes)
    return found


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return module._parameters.get(leaf, module._buffers.get(leaf))


@dataclass
class _Check:
    """Whether a model that was cut answers as it should; `ran` says if it ever answered at all."""

    model: nn.Module
    sample: Mapping[str, Any]
    expected: list[Tensor] | None
    ran: bool = False

    def __call__(self) -> bool:
        try:
            found = answer(self.model, self.sample)
        except Exception:  # sizes that do not fit fail in as many ways as there are models
            return False
        self.ran = True
        return self.expected is None or all(map(_close, found, self.expected))


def _fit(
    model: nn.Module, before: Shapes, after: Shapes, check: _Check, undo: list[Undo]
) -> tuple[dict[str, int] | None, Attributes]:
    """Set the sizes that go with the weights, in the configuration or else in the modules."""
    if before == after:
        return {}, {}
    for change in fitting_configs(model, after):
        steps = apply_config(model, change)
        if check():
            undo += steps
            return change, {}
        for step in reversed(steps):
            step()
    found = fit_attributes(model, before, check)
    if found is not None:
        undo += found[1]
        return None, found[0]
    what = "answers otherwise than the whole one with the same units switched off"
    raise PlaitError(
        f"the smaller {type(model).__name__} {what if check.ran else 'does not run'}: some module "
        "keeps a size that could not be found; the model is left as it was."
    )


@torch.no_grad()
def answer(model: nn.Module, sample: Mapping[str, Any]) -> list[Tensor]:
    """The model's outputs in eval mode, with its active adapters."""
    training = model.training
    given = to_device(sample, next(model.parameters()).device)
    if getattr(getattr(model, "config", None), "use_cache", None) is not None:
        given["use_cache"] = False
    try:
        return _tensors(model.eval()(**given))
    finally:
        model.train(training)


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, Mapping):
        out = list(out.values())
    return [t for x in out for t in _tensors(x)] if isinstance(out, list | tuple) else []


def _close(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or not one.is_floating_point():
        return one.shape == two.shape
    size = float(two.abs().max()) if two.numel() else 0.0
    gap = float((one.double() - two.double()).abs().max()) if two.numel() else 0.0
    return gap <= CLOSE * torch.finfo(one.dtype).eps * max(size, 1e-30)


def count_parameters(model: nn.Module) -> int:
    """Parameters of the base, tied ones once."""
    held = (p for _, module in base_modules(model) for p in module._parameters.values())
    return sum({id(p): p.numel() for p in held if p is not None}.values())
