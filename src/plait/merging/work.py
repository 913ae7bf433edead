"""What a streamed merge has to do, tensor by tensor: plain data that any process can be handed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.merging.shards import Planned, plan_shards, shard_names


@dataclass(frozen=True)
class Model:
    """An input: a checkpoint, with adapters of it added on (a base and its LoRA, say)."""

    path: str
    adapters: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "+".join((self.path, *self.adapters))


@dataclass(frozen=True)
class Read:
    """One tensor of one input, by the input's place and the name it has there.

    `rows` says which of the job's row maps brings a vocabulary's rows into the result's order.
    """

    model: int
    name: str
    rows: int | None = None


@dataclass(frozen=True)
class Way:
    """A merge method's name and options."""

    method: str
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Task:
    """How one tensor of the result is made.

    Without a way the first read is copied (times its weight); with one, the reads' differences from
    `base` (or the reads themselves, without a base) are merged and added to it.
    """

    planned: Planned
    reads: tuple[Read, ...]
    weights: tuple[float, ...]
    way: Way | None = None
    base: Read | None = None


@dataclass(frozen=True)
class RowMap:
    """For each row of the result's vocabulary the row of an input's (`own`, -1 where it has none).

    Where there is none the row is the mean of the rows (model, row) in `others`, taken from the
    tensor of the same name; the mean of all of the input's own rows where that is empty too, and
    zeros for the rows named in `zeros`.
    """

    own: tuple[int, ...]
    others: tuple[tuple[int, tuple[tuple[int, int], ...]], ...] = ()
    zeros: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a process needs to write any shard.

    `cast` names a dtype into which numbers are brought as they are read, before any arithmetic.
    """

    models: tuple[Model, ...]
    seed: int
    folder: str
    shards: tuple[tuple[Task, ...], ...]
    rows: tuple[RowMap, ...] = ()
    statistics: tuple[str, ...] = ()
    cast: str | None = None
    described: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def names(self) -> list[str]:
        """The files of the result."""
        return shard_names(len(self.shards))

    def file(self, index: int) -> Path:
        return Path(self.folder) / self.names[index]

    def planned(self) -> dict[str, list[Planned]]:
        """{file: the tensors in it}."""
        shards = zip(self.names, self.shards, strict=True)
        return {name: [task.planned for task in tasks] for name, tasks in shards}


def plan_tasks(tasks: Sequence[Task], limit: int) -> tuple[tuple[Task, ...], ...]:
    """Tasks in their order, in shards of at most `limit` bytes (or of one tensor)."""
    by_name = {task.planned.name: task for task in tasks}
    shards = plan_shards([task.planned for task in tasks], limit)
    return tuple(tuple(by_name[planned.name] for planned in shard) for shard in shards)
