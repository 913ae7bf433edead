"""The engine of streamed merges: a job's tensors made and written one by one, shard after shard.

    inputs, mapped ──► for each tensor: k changes ──► method ──► base + change ──► shard
                                   each shard renamed when it is complete, the folder at the end

Memory holds one tensor of every input and the result's, whatever the model's size; of a method that
takes its inputs in turn, one tensor. A run that was killed goes on with the shards that are
missing; the output's folder appears when all are there. The inputs are only read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import all_finite
from plait.merging.changes import Changes
from plait.merging.method import Merge, get_merge_method, make_merge
from plait.merging.opened import Asked, Opened, open_inputs
from plait.merging.progress import tracked
from plait.merging.report import Facts, facts_of, sampled, site_facts, write_report
from plait.merging.sequence import SequentialMerge
from plait.merging.shards import Planned, write_index, write_shard
from plait.merging.spaces import by_entries
from plait.merging.work import Job, Task, Way

PLAN = "merge.json"
"""What was merged, in the staging folder and in the result."""
KEPT = (".json", ".txt", ".model", ".jinja")
"""Files beside a model's weights that go along with the result: config and tokenizer."""


def staging_for(target: Path) -> Path:
    """The folder in which a result grows, beside where it will lie."""
    if target.exists():
        raise PlaitError(f"{target} exists; give another output, or remove it first.")
    return target.with_name(f".{target.name}.merging")


def run_job(
    job: Job,
    target: Path,
    files: Mapping[str, Path | bytes],
    *,
    processes: int = 1,
    progress: bool = False,
) -> Path:
    """The checkpoint folder `target`: the job's tensors, `files` beside them and merge.json.

    `files` are copied at the end: {name in the result: a file, or its content}.
    """
    staging = Path(job.folder)
    _prepare(staging, job)
    facts = _write_all(job, processes, progress)
    write_index(staging, job.planned())
    for name, source in files.items():
        if isinstance(source, bytes):
            (staging / name).write_bytes(source)
        else:
            shutil.copyfile(source, staging / name)
    write_report(staging / PLAN, job.described, facts)
    for hidden in staging.glob(".*"):
        hidden.unlink()
    os.rename(staging, target)
    return target


def files_beside(path: Path) -> dict[str, Path | bytes]:
    """A model's config and tokenizer files, for `run_job`."""
    found: dict[str, Path | bytes] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        listed = file.name.endswith(".index.json") or file.name == PLAN
        if file.is_file() and file.suffix in KEPT and not listed:
            found[file.name] = file
    return found


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
    paths = [path for model in job.models for path in (model.path, *model.adapters)]
    for path in dict.fromkeys((*paths, *job.statistics)):
        files = [Path(path)] if Path(path).is_file() else sorted(Path(path).glob("*"))
        seen += [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    text = repr((dataclasses.astuple(job), seen))
    return hashlib.sha256(text.encode()).hexdigest()


def _write_all(job: Job, processes: int, progress: bool) -> Facts:
    todo = [i for i in range(len(job.shards)) if not job.file(i).is_file()]
    if processes > 1 and len(todo) > 1:
        context = get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(todo)), mp_context=context) as pool:
            for _ in tracked(pool.map(_write_one, [job] * len(todo), todo), len(todo), progress):
                pass
    else:
        for index in tracked(todo, len(todo), progress):
            _write_one(job, index)
    found: Facts = {}
    for name in job.names:
        found |= json.loads((Path(job.folder) / f".{name}.json").read_text())
    return found


def _write_one(job: Job, index: int) -> None:
    """One shard, and the facts about its tensors beside it."""
    folder, name = Path(job.folder), job.names[index]
    tasks = {task.planned.name: task for task in job.shards[index]}
    facts: Facts = {}
    with open_inputs(job) as opened, torch.no_grad():

        def value(planned: Planned) -> Tensor:
            return _make(opened, tasks[planned.name], job.seed, facts)

        write_shard(folder / f".{name}.made", [t.planned for t in tasks.values()], value)
    (folder / f".{name}.json").write_text(json.dumps(facts))
    os.replace(folder / f".{name}.made", folder / name)


def _make(opened: Opened, task: Task, seed: int, facts: Facts) -> Tensor:
    """One tensor of the result; what is to say about it goes into `facts`."""
    planned = task.planned
    if task.way is None:
        found = opened.tensor(task.reads[0])
        scaled = found if task.weights[0] == 1 else found.float() * task.weights[0]
        return scaled.to(planned.dtype)
    base, changes = opened.changes(task, seed)
    if changes is None:  # nothing acts here, or it is not a number to merge
        assert base is not None
        return base.to(planned.dtype)
    way = _fitting(make_way(task.way), changes)
    merged, facts[planned.name] = _merged(way, changes, task.weights, opened)
    _require_finite(planned.name, merged)
    if base is not None:
        merged += base.reshape(merged.shape).to(merged.dtype)
    return merged.reshape(planned.shape).to(planned.dtype)


def make_way(way: Way) -> Merge:
    """The method with its options."""
    return make_merge(get_merge_method(way.method), dict(way.options))


def _fitting(way: Merge, changes: Changes) -> Merge:
    """The way itself; the weighted sum where it needs statistics that this tensor has none of."""
    if way.needs and all(item is None for item in changes.statistics or ()):
        return make_way(Way("linear"))
    return way


def _merged(
    way: Merge, changes: Changes, weights: tuple[float, ...], opened: Opened
) -> tuple[Tensor, dict[str, Any]]:
    """The merge [out, in] and the site's facts; inputs are held together only where they must."""
    if isinstance(way, SequentialMerge):
        rows = sampled(changes.shape)
        seen: list[Tensor] = []

        def look(change: Tensor) -> None:
            seen.append(torch.cat([change[r.start : r.stop] for r in rows]).float())
            opened.release()  # what is mapped counts as memory too

        merged = way.one_by_one(changes, weights, look)
        return merged, facts_of(torch.stack(seen), changes.shape)
    if isinstance(changes.dense, Asked):
        changes = dataclasses.replace(changes, dense=changes.dense.held())
    return by_entries(way, changes, weights), site_facts(changes)


def _require_finite(name: str, merged: Tensor) -> None:
    if not all_finite(merged):
        raise PlaitError(f"tensor {name!r} has NaN or infinity in an input, or after the merge.")
