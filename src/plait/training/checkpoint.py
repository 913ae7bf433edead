"""Checkpoints that a kill at any moment leaves complete: written beside, flushed, then renamed.

    checkpoint-40/  adapter/             the adapter in Plait's format, grown ranks and all
                    weights.safetensors  trained base weights (`method: none` only)
                    optimizer.pt scheduler.pt rules.pt rng_state.pth trainer_state.json

A folder of that name is complete. Base weights that do not train are never written.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "checkpoint-"
ADAPTER, WEIGHTS, RULES = "adapter", "weights.safetensors", "rules.pt"
_NAME = re.compile(rf"{PREFIX}(\d+)")


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [(int(m[1]), p) for p in output.glob(f"{PREFIX}*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def step_of(checkpoint: Path) -> int:
    """The optimiser steps done when it was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


@contextmanager
def staging(output: Path, step: int, main: bool = True) -> Iterator[Path]:
    """A hidden folder that becomes checkpoint-<step> when the block ends well.

    With several processes all write into it, and the main one renames it once all are done.
    """
    work, final = output / f".{PREFIX}{step}.tmp", output / f"{PREFIX}{step}"
    if main:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    _wait_for_all()
    try:
        yield work
        _wait_for_all()
        if main:
            flush(work)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(work, final)
            flush_entry(output)
        _wait_for_all()
    finally:
        if main:
            shutil.rmtree(work, ignore_errors=True)


def rotate(output: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what a killed process left behind."""
    for old in checkpoints(output)[:-keep]:
        # Renamed first: a folder that is half deleted must not look like a checkpoint.
        doomed = old.with_name(f".{old.name}.tmp")
        os.rename(old, doomed)
    remove_leftovers(output)


def remove_leftovers(output: Path) -> None:
    for leftover in output.glob(f".{PREFIX}*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def flush(folder: Path) -> None:
    """Every file to the disk, so that the rename cannot become durable before what it names."""
    for path in [*folder.rglob("*"), folder]:
        flush_entry(path)


def flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot flush a folder
    finally:
        os.close(descriptor)


def _wait_for_all() -> None:
    import torch.distributed as distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
