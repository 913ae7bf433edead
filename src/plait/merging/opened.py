"""The inputs of a streamed merge, open side by side: one tensor's changes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from plait.adapter import Adapter
from plait.errors import PlaitError
from plait.merging.changes import Changes
from plait.merging.checkpoints import Checkpoint
from plait.merging.stored import Stored
from plait.merging.work import Job, Model, Read, RowMap, Task

TIED = {"lm_head.weight": ("embed_tokens.weight", "wte.weight", "embeddings.weight")}
"""A head that its checkpoint leaves out is its embedding."""


@dataclass(frozen=True)
class Opened:
    """The inputs of a job, in their order."""

    models: Sequence[Model]
    checkpoints: dict[str, Checkpoint]
    adapters: dict[str, Adapter]
    rows: Sequence[RowMap] = ()
    statistics: Sequence[Stored] = field(default=())
    cast: torch.dtype | None = None

    def changes(self, task: Task, seed: int) -> tuple[Tensor | None, Changes | None]:
        """(the base's tensor, what the reads change of it as matrices); None where nothing does.

        The changes are read when they are asked for, one input at a time. Without a base the
        tensors themselves are the changes.
        """
        base = None if task.base is None else self.tensor(task.base)
        some = base if base is not None else self.tensor(task.reads[0])
        if not some.is_floating_point():
            return some, None
        if base is not None and all(self._same(read, task.base) for read in task.reads):
            return base, None
        dense = Asked(len(task.reads), lambda i: matrix(self.tensor(task.reads[i])))
        return base, Changes(
            task.planned.name,
            dense=dense,
            base=None if base is None else matrix(base),
            seed=seed,
            statistics=self._known(task.reads),
        )

    def tensor(self, read: Read) -> Tensor:
        """One tensor of one input, with its adapters' changes, in the result's vocabulary."""
        found = self._stored(self.models[read.model], read.name)
        return found if read.rows is None else self._mapped(found, read, self.rows[read.rows])

    def release(self) -> None:
        """Let go of all mapped files; tensors that were read stay."""
        for checkpoint in self.checkpoints.values():
            checkpoint.release()

    def acting(self, read: Read) -> list[str]:
        """The adapters of an input that change this tensor."""
        adapters = self.models[read.model].adapters
        return [a for a in adapters if site_path(read.name) in self.adapters[a].deltas]

    def _same(self, read: Read, base: Read | None) -> bool:
        """Whether an input holds the base's own tensor, because no adapter of it acts there."""
        assert base is not None
        here, there = self.models[read.model], self.models[base.model]
        plain = (here.path, read.name, read.rows) == (there.path, base.name, base.rows)
        return plain and self.acting(read) == self.acting(base) == []

    def _stored(self, model: Model, name: str) -> Tensor:
        checkpoint = self.checkpoints[model.path]
        held = held_as(checkpoint, name)
        if held is None:
            raise PlaitError(f"{checkpoint.path} has no tensor {name!r}.")
        found = checkpoint.read(held)
        for path in model.adapters:
            found = with_adapter(found, self.adapters[path], name)
        if self.cast is not None and found.is_floating_point():
            found = found.to(self.cast)
        return found

    def _mapped(self, found: Tensor, read: Read, rows: RowMap) -> Tensor:
        """The rows of a vocabulary in the result's order (see `RowMap`)."""
        own = torch.tensor(rows.own)
        made = found[own.clamp_min(0)]
        missing = own < 0
        if bool(missing.any()):
            made[missing] = found.float().mean(0).to(found.dtype)
        tensors = {read.model: found}
        for row, sources in rows.others:
            for model, _ in sources:
                if model not in tensors:
                    tensors[model] = self._stored(self.models[model], read.name)
            there = [tensors[model][at].float() for model, at in sources]
            made[row] = torch.stack(there).mean(0).to(found.dtype)
        made[list(rows.zeros)] = 0
        return made

    def _known(self, reads: Sequence[Read]) -> list[Tensor | None] | None:
        if not self.statistics:
            return None
        pairs = zip(self.statistics, reads, strict=True)
        return [stored.get(site_path(read.name)) for stored, read in pairs]


class Asked(Sequence[Tensor]):
    """Tensors that are made each time they are asked for, so that none need be held."""

    def __init__(self, count: int, make: Callable[[int], Tensor]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if index >= self._count:
            raise IndexError(index)
        return self._make(index)

    def held(self) -> list[Tensor]:
        """All of them, made once."""
        return [self[i] for i in range(self._count)]


def with_adapter(found: Tensor, adapter: Adapter, name: str) -> Tensor:
    """A tensor plus an adapter's change of it, at least float32; itself where none acts."""
    delta = adapter.deltas.get(site_path(name))
    change = None if delta is None else delta.bias() if name.endswith(".bias") else delta.dense()
    if delta is None or change is None:
        return found
    if not name.endswith(".bias"):
        change = delta.site.replacement(change)
    if change.numel() != found.numel():
        raise PlaitError(
            f"adapter {adapter.name!r} changes {name!r} as {list(change.shape)}, but the base's "
            f"is {list(found.shape)}; it belongs to another model."
        )
    wide = torch.promote_types(found.dtype, torch.float32)
    return found.to(wide) + change.detach().reshape(found.shape).to(wide)


def held_as(checkpoint: Checkpoint, name: str) -> str | None:
    """The name under which a checkpoint holds a tensor: its own, or what it is tied to."""
    if name in checkpoint.entries:
        return name
    for head, embeddings in TIED.items():
        if name.endswith(head) and tied(checkpoint):
            for other in checkpoint.entries:
                if other.endswith(embeddings):
                    return other
    return None


def tied(checkpoint: Checkpoint) -> bool:
    """Whether a model's config says that head and embedding are one tensor."""
    return bool(checkpoint.config.get("tie_word_embeddings", True))  # not written where it is so


def site_path(name: str) -> str:
    """The site whose weight or bias has this name."""
    return name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name


def matrix(tensor: Tensor) -> Tensor:
    """A vector as one row, a convolution's kernel or packed experts with their first axis kept."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)


@contextmanager
def open_inputs(job: Job) -> Iterator[Opened]:
    """The inputs by path: checkpoints are mapped, adapters are read; each file once."""
    from plait.adapter.formats import read_adapter

    with ExitStack() as stack:
        paths = {model.path for model in job.models}
        checkpoints = {p: stack.enter_context(Checkpoint(p)) for p in sorted(paths)}
        names = {a for model in job.models for a in model.adapters}
        adapters = {name: read_adapter(name) for name in sorted(names)}
        stored = [Stored(path) for path in job.statistics]
        cast = None if job.cast is None else getattr(torch, job.cast)
        yield Opened(job.models, checkpoints, adapters, job.rows, stored, cast)
