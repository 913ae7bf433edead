"""The inputs of a streamed merge, open side by side: one tensor's changes at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.adapter import Adapter
from plait.errors import PlaitError
from plait.merging.changes import Changes
from plait.merging.checkpoints import Checkpoint, holds_checkpoint


@dataclass(frozen=True)
class Opened:
    """A base (or none) and the inputs, in their order."""

    base: Checkpoint | None
    inputs: Sequence[Checkpoint | Adapter]

    def changes(self, name: str, seed: int) -> tuple[Tensor | None, Changes | None]:
        """(the base's tensor, what the inputs change of it as matrices); None where nothing does.

        Without a base the tensors themselves are the changes.
        """
        base = None if self.base is None else self.base.read(name)
        some = base if base is not None else self._first().read(name)
        if not some.is_floating_point():
            return some, None
        if base is None:
            dense = [_matrix(c.read(name)) for c in self.inputs if isinstance(c, Checkpoint)]
            return None, Changes(name, dense=dense, seed=seed)
        models = [i for i in self.inputs if isinstance(i, Checkpoint)]
        if not models and not any(_path(name) in a.deltas for a in self._adapters()):
            return base, None
        dense = [self._tensor(each, name, base) for each in self.inputs]
        return base, Changes(name, dense=dense, base=_matrix(base), seed=seed)

    def _adapters(self) -> list[Adapter]:
        return [i for i in self.inputs if isinstance(i, Adapter)]

    def _first(self) -> Checkpoint:
        return next(i for i in self.inputs if isinstance(i, Checkpoint))

    def _tensor(self, each: Checkpoint | Adapter, name: str, base: Tensor) -> Tensor:
        if isinstance(each, Checkpoint):
            return _matrix(each.read(name))
        delta = each.deltas.get(_path(name))
        if delta is None:
            return _matrix(base)
        change = delta.bias() if name.endswith(".bias") else delta.dense()
        if change is None:
            return _matrix(base)
        if not name.endswith(".bias"):
            change = delta.site.replacement(change)
        if change.numel() != base.numel():
            raise PlaitError(
                f"adapter {each.name!r} changes {name!r} as {list(change.shape)}, but the base's "
                f"is {list(base.shape)}; it belongs to another model."
            )
        wide = torch.promote_types(base.dtype, torch.float32)
        return _matrix(base.to(wide) + change.detach().reshape(base.shape).to(wide))


def _path(name: str) -> str:
    """The site whose weight or bias has this name."""
    return name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name


def _matrix(tensor: Tensor) -> Tensor:
    """A vector as one row, a convolution's kernel or packed experts with their first axis kept."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)


@contextmanager
def open_inputs(base: str | None, inputs: Sequence[str]) -> Iterator[Opened]:
    """The inputs by path: checkpoints are mapped, adapters are read."""
    from plait.adapter.formats import read_adapter

    with ExitStack() as stack:
        first = None if base is None else stack.enter_context(Checkpoint(base))
        found: list[Checkpoint | Adapter] = []
        for path in inputs:
            if holds_checkpoint(path):
                found.append(stack.enter_context(Checkpoint(path)))
            else:
                found.append(read_adapter(path))
        yield Opened(first, found)
