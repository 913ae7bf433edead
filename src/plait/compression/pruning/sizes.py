"""The sizes that a model keeps beside its weights, made to fit weights that were cut.

Two ways, neither of which knows an architecture. A model of transformers is rebuilt, without
numbers, from configurations in which some of the sizes are scaled as the weights were, until one
gives exactly the new shapes. For other models, and for shapes that no configuration gives, whole
numbers in the modules around the cut layers are tried until the model answers as it should.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from plait.adapter.targets import base_modules
from plait.compression.pruning.removal import Undo, set_attributes

Shapes = Mapping[str, torch.Size]
Cuts = set[tuple[int, int]]
"""(old, new) lengths of dimensions."""
MOST_TRIED = 256


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """{name: shape} of every parameter and saved buffer of the base, tied ones by every name."""
    found = {}
    for path, module in base_modules(model):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = tensor.shape
    return found


def scaled(value: int, cuts: Cuts) -> set[int]:
    """What a number that divides a cut dimension may have become."""
    found = {value * new // old for old, new in cuts if old % value == 0 and value * new % old == 0}
    return found - {value}


# -- configurations of transformers ---------------------------------------------------------------


def rebuild(model: nn.Module, config: Any) -> nn.Module | None:
    """The model of a configuration, without numbers; None where it has none."""
    cls: Any = type(model)
    try:
        with torch.device("meta"):
            made: nn.Module = cls._from_config(config)
        return made
    except Exception:  # whatever a model thinks of sizes that do not go together
        return None


def fitting_configs(model: nn.Module, wanted: Shapes) -> Iterator[dict[str, int]]:
    """Keys of the configuration to change, so that it gives the shapes `wanted`.

    Several ways may give them (fewer heads, or narrower ones). The model may be cut already.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(type(model), "_from_config"):
        return
    plain = rebuild(model, config)
    before = {} if plain is None else shapes_of(plain)
    if before.keys() != wanted.keys():
        return
    changed = {n for n in wanted if wanted[n] != before[n]}
    cuts = {(a, b) for n in changed for a, b in zip(before[n], wanted[n], strict=True) if a != b}

    def shapes(change: Mapping[str, int]) -> Shapes | None:
        trial = copy.deepcopy(config)
        for key, value in change.items():
            setattr(trial, key, value)
        made = rebuild(model, trial)
        return None if made is None else shapes_of(made)

    def may_help(key: str, value: int) -> bool:
        alone = shapes({key: value})  # None: sizes that only go together with others
        if alone is None:
            return True
        moved = {n for n in before if alone.get(n) != before[n]} | (alone.keys() - before.keys())
        # A key that is unset may only say what was implied, until another one changes.
        return moved <= changed and (bool(moved) or getattr(config, key) is None)

    helping = {k: {v for v in vs if may_help(k, v)} for k, vs in _candidates(config, cuts).items()}
    for change in _changes({key: values for key, values in helping.items() if values}):
        if shapes(change) == dict(wanted):
            yield change


def _candidates(config: Any, cuts: Cuts) -> dict[str, set[int]]:
    found = {}
    for key, value in config.to_dict().items():
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            found[key] = scaled(value, cuts)
        elif value is None and any(word in key for word in ("inner", "dim", "size")):
            found[key] = {new for _, new in cuts} | _implied(config)
    return {key: values for key, values in found.items() if values}


def _implied(config: Any) -> set[int]:
    """The width of a head, which configurations leave out while it follows from two others."""
    width, heads = (getattr(config, k, None) for k in ("hidden_size", "num_attention_heads"))
    known = isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads == 0
    return {width // heads} if known else set()  # type: ignore[operator]


def _changes(candidates: Mapping[str, set[int]]) -> Iterator[dict[str, int]]:
    """Few keys at a time first."""
    tried = 0
    for count in range(len(candidates) + 1):
        for keys in itertools.combinations(sorted(candidates), count):
            for values in itertools.product(*(sorted(candidates[k]) for k in keys)):
                tried += 1
                if tried > MOST_TRIED:
                    return
                yield dict(zip(keys, values, strict=True))


def apply_config(model: nn.Module, change: Mapping[str, int]) -> list[Undo]:
    """Change the configuration in place, and every number in the modules as it says."""
    config: Any = model.config
    undo: list[Undo] = []
    for key, value in change.items():
        undo.append(partial(setattr, config, key, getattr(config, key)))
        setattr(config, key, value)
    made = rebuild(model, config)
    assert made is not None
    for path, module in base_modules(model):
        theirs = vars(made.get_submodule(path))
        plain = {k: v for k, v in theirs.items() if _is_plain(v) and not k.startswith("_")}
        mine = {k: v for k, v in plain.items() if k != "training" and k in vars(module)}
        undo += set_attributes(module, mine)
    return undo


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(v) for v in value)
    return isinstance(value, int | float | str)


# -- whole numbers in the modules -----------------------------------------------------------------

Attributes = dict[str, dict[str, int]]
"""{module: {attribute: value}}."""


def fit_attributes(
    model: nn.Module, before: Shapes, works: Callable[[], bool]
) -> tuple[Attributes, list[Undo]] | None:
    """Attributes to change beside the cut weights, so that `works()`; None where none help.

    before: the shapes before the cut. Attributes that bear one name in modules of one class change
    together.
    """
    choices = _choices(model, before)
    keys = sorted(choices)
    tried = 0
    for count in range(len(keys) + 1):
        for chosen in itertools.combinations(keys, count):
            tried += 1
            if tried > MOST_TRIED:
                return None
            values: Attributes = {}
            for key in chosen:
                for path, value in choices[key].items():
                    values.setdefault(path, {})[key[1]] = value
            undo = set_all(model, values)
            if works():
                return values, undo
            for step in reversed(undo):
                step()
    return None


def set_all(model: nn.Module, values: Mapping[str, Mapping[str, int]]) -> list[Undo]:
    undo: list[Undo] = []
    for path, attributes in values.items():
        undo += set_attributes(model.get_submodule(path), attributes)
    return undo


def _choices(model: nn.Module, before: Shapes) -> dict[tuple[str, str], dict[str, int]]:
    """{(class, attribute): {module: what it may have become}}, around layers that were cut."""
    after = shapes_of(model)
    cuts: dict[str, Cuts] = {}
    for name, shape in after.items():
        layer = name.rpartition(".")[0]
        found = {(a, b) for a, b in zip(before[name], shape, strict=True) if a != b}
        for path in (layer, layer.rpartition(".")[0]):
            if found:
                cuts.setdefault(path, set()).update(found)
    choices: dict[tuple[str, str], dict[str, int]] = {}
    for path, here in cuts.items():
        module = model.get_submodule(path)
        for name, value in vars(module).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 2:
                continue
            became = sorted(scaled(value, here), key=lambda new: _exactly(value, new, here))
            if became and not name.startswith("_"):
                choices.setdefault((type(module).__name__, name), {})[path] = became[0]
    return choices


def _exactly(value: int, new: int, cuts: Cuts) -> bool:
    """False, which sorts first, for a dimension's own length."""
    return (value, new) not in cuts
