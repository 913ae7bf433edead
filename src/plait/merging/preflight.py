"""Checks before any tensor is merged: everything that the headers and configs can tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from plait.errors import PlaitError
from plait.merging.checkpoints import Checkpoint, Entry, holds_checkpoint
from plait.merging.shards import Planned

SHAPING = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
"""Keys of config.json that two models must share to be merged tensor by tensor."""


def check_inputs(
    pattern: str, inputs: Sequence[str], *, against_base: bool, dtype: torch.dtype | None
) -> list[Planned]:
    """The tensors of the result, which are those of `pattern` (the base, or the first input).

    Raises PlaitError, naming the input and the tensor, for another architecture, a missing or a
    surplus tensor, or another shape (and, where it is the vocabulary, says so).
    """
    with Checkpoint(pattern) as first:
        for path in inputs:
            if path == pattern:
                if against_base:
                    raise PlaitError(f"{path} is the base itself; it changes nothing.")
            elif holds_checkpoint(path):
                with Checkpoint(path) as other:
                    _same_config(first, other)
                    _same_tensors(first, other)
            elif against_base:
                _check_adapter(path, first)
            else:
                raise PlaitError(f"{path} is an adapter; give base=, the model that it changes.")
        return [_planned(name, entry, dtype) for name, entry in first.entries.items()]


def _check_adapter(path: str, base: Checkpoint) -> None:
    from plait.adapter.formats import read_adapter

    adapter = read_adapter(path)
    adapter.check()
    for where, delta in adapter.deltas.items():
        if delta.traits.depends_on_base or not delta.traits.linear_in_x:
            raise PlaitError(
                f"adapter {path} ({adapter.method.name}) cannot say what it changes without its "
                "base model; attach it, and save adapter.to_lora() instead."
            )
        if f"{where}.weight" not in base.entries and where not in base.entries:
            raise PlaitError(f"{base.path} has no tensor for site {where!r} of adapter {path}.")


def _planned(name: str, entry: Entry, dtype: torch.dtype | None) -> Planned:
    changed = dtype is not None and entry.dtype.is_floating_point
    return Planned(name, entry.shape, dtype if changed and dtype is not None else entry.dtype)


def _same_config(first: Checkpoint, other: Checkpoint) -> None:
    for key in SHAPING:
        one, two = first.config.get(key), other.config.get(key)
        if one is not None and two is not None and one != two:
            raise PlaitError(
                f"{other.path} has {key} {two}, {first.path} has {one}; merge fine-tunes of one "
                "base model."
            )


def _same_tensors(first: Checkpoint, other: Checkpoint) -> None:
    missing = sorted(first.entries.keys() - other.entries.keys())
    surplus = sorted(other.entries.keys() - first.entries.keys())
    if missing or surplus:
        what = f"lacks {_some(missing)}" if missing else f"has {_some(surplus)} besides"
        raise PlaitError(
            f"{other.path} {what}, compared with {first.path}; save both with the same library "
            "(a tied head may be stored in one and not in the other)."
        )
    for name, entry in first.entries.items():
        _same_shape(name, entry, other.entries, first, other)


def _same_shape(
    name: str, entry: Entry, others: Mapping[str, Entry], first: Checkpoint, other: Checkpoint
) -> None:
    shape = others[name].shape
    if shape == entry.shape:
        return
    words = len(shape) == 2 == len(entry.shape) and shape[1] == entry.shape[1]
    hint = " The vocabularies differ: align the tokenizers first." if words else ""
    raise PlaitError(
        f"tensor {name!r} is {list(shape)} in {other.path} and {list(entry.shape)} in "
        f"{first.path}.{hint}"
    )


def _some(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(map(repr, found[:3])) + more
