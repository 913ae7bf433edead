"""`merge_checkpoints`: full models (and adapters) into one checkpoint, tensor by tensor.

    base + k inputs, mapped ──► checks ──► for each tensor: k changes ──► method ──► base + change
                                           shard after shard, each renamed when it is complete

Memory holds one tensor of every input and the result's, whatever the model's size. A run that was
killed goes on with the shards that are missing; the output's folder appears when all are there. The
inputs are only read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.merging.checkpoints import holds_checkpoint
from plait.merging.method import choose_space, get_merge_method, make_merge
from plait.merging.preflight import check_inputs
from plait.merging.progress import tracked
from plait.merging.report import Facts, site_facts, write_report
from plait.merging.shards import Planned, plan_shards, shard_names, write_index, write_shard
from plait.merging.sources import check_weights
from plait.merging.spaces import by_entries

SHARD = 5 * 10**9
PLAN = "merge.json"
"""What was merged, in the staging folder and in the result."""


@dataclass(frozen=True)
class Job:
    """All that a process needs to write any shard."""

    base: str | None
    inputs: tuple[str, ...]
    method: str
    options: tuple[tuple[str, Any], ...]
    weights: tuple[float, ...]
    seed: int
    folder: str
    shards: tuple[tuple[Planned, ...], ...]


def merge_checkpoints(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    method: str = "linear",
    weights: Sequence[float] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
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
        shard_size: bytes a file of the result has at most.
        processes: how many write shards at the same time; the result does not depend on it.

    The result holds the base's (or the first input's) config and tokenizer files, and merge.json
    with what was done and, for every tensor, norms, cosines and sign conflicts of the inputs.
    Raises PlaitError for unknown names, inputs of another shape, vocabulary or set of tensors, NaN,
    or a folder `out` that exists.
    """
    chosen = get_merge_method(method)
    way = make_merge(chosen, options)
    choose_space(chosen.name, way, "delta")
    if way.needs:
        needed = " and ".join(sorted(way.needs))
        raise PlaitError(
            f"merge method {chosen.name!r} needs statistics of data ({needed}), which a streamed "
            "merge does not take; merge adapters, or extract them first with `plait extract`."
        )
    if way.reads_base and base is None:
        raise PlaitError(f"merge method {chosen.name!r} reads the base's weights; give base=.")
    factors = check_weights(weights, len(inputs))
    target = Path(out)
    if target.exists():
        raise PlaitError(f"{target} exists; give another output, or remove it first.")
    paths = tuple(str(Path(p)) for p in inputs)
    pattern = str(Path(base)) if base is not None else next(filter(holds_checkpoint, paths), None)
    if pattern is None:
        raise PlaitError("merging adapters into a checkpoint needs base=, the model they change.")
    planned = check_inputs(pattern, paths, against_base=base is not None, dtype=dtype)
    shards = tuple(tuple(shard) for shard in plan_shards(planned, shard_size))
    staging = target.with_name(f".{target.name}.merging")
    given = tuple(sorted(dataclasses.asdict(way).items()))  # type: ignore[call-overload]
    first = None if base is None else pattern
    job = Job(first, paths, method, given, tuple(factors), seed, str(staging), shards)
    _prepare(staging, job)
    facts = _write_all(job, processes, progress)
    _finish(staging, target, Path(pattern), job, facts)
    return target


def _prepare(staging: Path, job: Job) -> None:
    """The staging folder; one that holds shards of another merge is emptied."""
    mark = _digest(job)
    known = staging / ".digest"
    if not known.is_file() or known.read_text() != mark:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        known.write_text(mark)


def _digest(job: Job) -> str:
    """Of the plan and of what the input files are (size and time of change)."""
    seen = []
    for path in filter(None, (job.base, *job.inputs)):
        files = [Path(path)] if Path(path).is_file() else sorted(Path(path).glob("*"))
        seen += [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    text = repr((dataclasses.astuple(job), seen))
    return hashlib.sha256(text.encode()).hexdigest()


def _write_all(job: Job, processes: int, progress: bool) -> Facts:
    names = shard_names(len(job.shards))
    todo = [i for i, name in enumerate(names) if not (Path(job.folder) / name).is_file()]
    if processes > 1 and len(todo) > 1:
        context = get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(todo)), mp_context=context) as pool:
            for _ in tracked(pool.map(_write_one, [job] * len(todo), todo), len(todo), progress):
                pass
    else:
        for index in tracked(todo, len(todo), progress):
            _write_one(job, index)
    found: Facts = {}
    for name in names:
        found |= json.loads((Path(job.folder) / f".{name}.json").read_text())
    return found


def _write_one(job: Job, index: int) -> None:
    """One shard, and the facts about its tensors beside it."""
    from plait.merging.opened import open_inputs

    way = make_merge(get_merge_method(job.method), dict(job.options))
    name = shard_names(len(job.shards))[index]
    facts: Facts = {}
    with open_inputs(job.base, job.inputs) as opened:

        def value(planned: Planned) -> Tensor:
            base, changes = opened.changes(planned.name, job.seed)
            if changes is None:  # nothing acts here, or it is not a number to merge
                assert base is not None
                return base.to(planned.dtype)
            facts[planned.name] = site_facts(changes)
            merged = by_entries(way, changes, job.weights)
            _require_finite(planned.name, merged)
            if base is not None:
                merged += base.reshape(merged.shape).to(merged.dtype)
            return merged.reshape(planned.shape).to(planned.dtype)

        folder = Path(job.folder)
        with torch.no_grad():
            write_shard(folder / f".{name}.made", job.shards[index], value)
        (folder / f".{name}.json").write_text(json.dumps(facts))
        os.replace(folder / f".{name}.made", folder / name)


def _require_finite(name: str, merged: Tensor) -> None:
    if not bool(torch.isfinite(merged.sum())) and not bool(torch.isfinite(merged).all()):
        raise PlaitError(f"tensor {name!r} has NaN or infinity in an input, or after the merge.")


def _finish(staging: Path, target: Path, pattern: Path, job: Job, facts: Facts) -> None:
    names = shard_names(len(job.shards))
    write_index(staging, dict(zip(names, job.shards, strict=True)))
    for file in sorted(pattern.iterdir()) if pattern.is_dir() else ():
        kept = file.suffix in (".json", ".txt", ".model", ".jinja")
        if file.is_file() and kept and not file.name.endswith(".index.json"):
            shutil.copyfile(file, staging / file.name)
    described = {
        "method": job.method,
        "options": dict(job.options),
        "weights": list(job.weights),
        "base": job.base,
        "inputs": list(job.inputs),
        "seed": job.seed,
    }
    write_report(staging / PLAN, described, facts)
    for hidden in staging.glob(".*"):
        hidden.unlink()
    os.rename(staging, target)
