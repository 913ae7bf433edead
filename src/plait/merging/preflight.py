"""Checks before any tensor is merged: everything that the headers and configs can tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from plait.errors import PlaitError
from plait.merging.checkpoints import Checkpoint
from plait.merging.opened import held_as, tied
from plait.merging.work import Job, Model, Read, Task

SHAPING = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
"""Keys of config.json that two models must share to be merged tensor by tensor."""


def check_models(
    first: Checkpoint, models: Sequence[Model], opened: Mapping[str, Checkpoint], *skipped: str
) -> None:
    """PlaitError where a model is of another architecture than `first`, by its config; or where an
    adapter does not belong to its model. `skipped` names keys that may differ."""
    for path in dict.fromkeys(model.path for model in models):
        _same_config(first, opened[path], set(SHAPING) - set(skipped))
    for model in models:
        for adapter in model.adapters:
            _check_adapter(adapter, opened[model.path])


def check_tasks(job: Job, opened: Mapping[str, Checkpoint], hint: str) -> None:
    """PlaitError, naming the input and the tensor, where one is missing or of another shape.

    `hint` says what to do where it is the vocabulary that differs.
    """
    for task in (task for shard in job.shards for task in shard):
        for read in (*task.reads, *([task.base] if task.base is not None else [])):
            _check_read(job, task, read, opened[job.models[read.model].path], hint)


def check_surplus(names: Iterable[str], models: Sequence[Checkpoint], first: Checkpoint) -> None:
    """PlaitError where a model holds tensors that the result would leave out, besides `names`."""
    wanted = set(names)
    for other in models:
        surplus = sorted(n for n in other.entries if n not in wanted and not _tied(other, n))
        if surplus:
            raise PlaitError(
                f"{other.path} has {_some(surplus)} besides, compared with {first.path}; save both "
                "with the same library (a tied head may be stored in one and not in the other)."
            )


def _tied(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is but a copy of the embedding that it is tied to."""
    return name.endswith("lm_head.weight") and tied(checkpoint)


def _check_read(job: Job, task: Task, read: Read, checkpoint: Checkpoint, hint: str) -> None:
    held = held_as(checkpoint, read.name)
    if held is None:
        raise PlaitError(
            f"{checkpoint.path} lacks {read.name!r}, which the result needs; save all inputs with "
            "the same library (a tied head may be stored in one and not in the other)."
        )
    shape, wanted = checkpoint.entries[held].shape, task.planned.shape
    if read.rows is not None:
        shape = (len(job.rows[read.rows].own), *shape[1:])
    if shape != wanted:
        words = len(shape) == 2 == len(wanted) and shape[1] == wanted[1]
        more = f" The vocabularies differ: {hint}" if words else ""
        raise PlaitError(
            f"tensor {read.name!r} is {list(shape)} in {checkpoint.path} and {list(wanted)} in the "
            f"result.{more}"
        )


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


def _same_config(first: Checkpoint, other: Checkpoint, keys: set[str]) -> None:
    for key in SHAPING:
        one, two = _setting(first, key), _setting(other, key)
        if key in keys and one is not None and two is not None and one != two:
            raise PlaitError(
                f"{other.path} has {key} {two}, {first.path} has {one}; merge fine-tunes of one "
                "base model."
            )


def _setting(checkpoint: Checkpoint, key: str) -> object:
    text = checkpoint.config.get("text_config")
    return checkpoint.config.get(key, text.get(key) if isinstance(text, dict) else None)


def _some(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(map(repr, found[:3])) + more
