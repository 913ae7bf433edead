"""`merge_checkpoints`: full models (and adapters) into one checkpoint, by one method throughout."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from plait.errors import PlaitError
from plait.merging.checkpoints import Checkpoint, Entry, holds_checkpoint
from plait.merging.engine import files_beside, run_job, staging_for
from plait.merging.method import Merge, MergeMethod, choose_space, get_merge_method, make_merge
from plait.merging.preflight import check_models, check_surplus, check_tasks
from plait.merging.shards import Planned
from plait.merging.sources import check_weights
from plait.merging.stored import Stored, open_statistics
from plait.merging.work import Job, Model, Read, Task, Way, plan_tasks

SHARD = 5 * 10**9
ALIGN = "align the tokenizers first, with tokenizer_source in a recipe."


def merge_checkpoints(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    method: str = "linear",
    weights: Sequence[float] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    statistics: Sequence[str | os.PathLike[str]] | None = None,
    seed: int = 0,
    shard_size: int = SHARD,
    processes: int = 1,
    progress: bool = False,
    **options: Any,
) -> Path:
    """A checkpoint folder `out`: the base's tensors plus the merge of what the inputs change.

    Args:
        inputs: checkpoint folders or files (safetensors), and adapters of the base among them.
        method: any merge method with space "delta".
        weights: one for each input; None takes their mean (1 / k each).
        base: what the inputs' changes are against; without it the tensors themselves are merged
            (an average of models, a slerp between two).
        dtype: of the result; None keeps each tensor's in the base (or in the first input).
        statistics: for methods that need some, a file for each input (see
            `plait.merging.statistics`); tensors that they say nothing of take the weighted sum.
        shard_size: bytes a file of the result has at most.
        processes: how many write shards at the same time; the result does not depend on it.

    The result holds the base's (or the first input's) config and tokenizer files, and merge.json
    with what was done and, for every tensor, norms, cosines and sign conflicts of the inputs.
    Raises PlaitError for unknown names, inputs of another shape, vocabulary or set of tensors, NaN,
    or a folder `out` that exists.
    """
    chosen = get_merge_method(method)
    way = make_merge(chosen, options)
    _check_method(chosen, way, len(inputs), base is not None, statistics)
    factors = check_weights(weights, len(inputs))
    target = Path(out)
    staging = staging_for(target)
    paths = [str(Path(p)) for p in inputs]
    models, pattern = _models(paths, None if base is None else str(Path(base)))
    known = () if statistics is None else tuple(str(Path(s)) for s in statistics)
    described = {
        "method": chosen.name,
        "options": dataclasses.asdict(way),  # type: ignore[call-overload]
        "weights": list(factors),
        "base": None if base is None else pattern,
        "inputs": paths,
        "seed": seed,
    }
    given = Way(chosen.name, tuple(sorted(described["options"].items())))
    with ExitStack() as stack:
        opened = {m.path: stack.enter_context(Checkpoint(m.path)) for m in models}
        first = opened[pattern]
        check_models(first, models, opened, "vocab_size")
        check_surplus(first.entries, list(opened.values()), first)
        tasks = [
            _task(name, entry, dtype, given, factors, len(models), base is not None)
            for name, entry in first.entries.items()
        ]
        job = Job(
            models=models,
            seed=seed,
            folder=str(staging),
            shards=plan_tasks(tasks, shard_size),
            statistics=known,
            described=described,
        )
        check_tasks(job, opened, ALIGN)
    return run_job(job, target, files_beside(Path(pattern)), processes=processes, progress=progress)


def _check_method(
    chosen: MergeMethod, way: Merge, count: int, base: bool, statistics: Sequence[Any] | None
) -> None:
    choose_space(chosen.name, way, "delta")
    if chosen.inputs not in (None, count):
        raise PlaitError(f"{chosen.name} merges {chosen.inputs} inputs, not {count}.")
    if way.reads_base and not base:
        raise PlaitError(f"merge method {chosen.name!r} reads the base's weights; give base=.")
    for stored in open_statistics(chosen.name, way.needs, statistics, count) or ():
        if not isinstance(stored, Stored):
            raise PlaitError("a streamed merge takes statistics from files; save them first.")


def _models(paths: Sequence[str], base: str | None) -> tuple[tuple[Model, ...], str]:
    """The job's models (the base last, where there is one) and the one that the result is like."""
    whole = [path for path in paths if holds_checkpoint(path)]
    if base is None and len(whole) < len(paths):
        if not whole:
            raise PlaitError("merging adapters into a checkpoint needs base=, what they change.")
        adapter = next(path for path in paths if path not in whole)
        raise PlaitError(f"{adapter} is an adapter; give base=, the model that it changes.")
    if base in whole:
        raise PlaitError(f"{base} is the base itself; it changes nothing.")
    models = [Model(p) if p in whole else Model(str(base), (p,)) for p in paths]
    return (*models, *([Model(base)] if base is not None else [])), base or paths[0]


def _task(
    name: str,
    entry: Entry,
    dtype: torch.dtype | None,
    way: Way,
    weights: Sequence[float],
    count: int,
    based: bool,
) -> Task:
    """The merge of all inputs at one tensor; the last model is the base, where there is one."""
    reads = tuple(Read(i, name) for i in range(count))
    kept = entry.dtype if dtype is None or not entry.dtype.is_floating_point else dtype
    planned = Planned(name, entry.shape, kept)
    if based:
        return Task(planned, reads[:-1], tuple(weights), way, reads[-1])
    return Task(planned, reads, tuple(weights), way)
