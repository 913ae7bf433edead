"""A memory of training rows in which every row that was ever seen stands with the same probability.

Row j takes a place of its own while there is one; later it replaces a random row with probability
size / j (reservoir sampling). Which ones is a function of the seed and j alone, so that resumed
runs and accumulated micro-batches fill the same memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from plait.adapter.formats.atomic import tensors_writer, write_file
from plait.adapter.seeds import generator
from plait.errors import FormatError, PlaitError
from plait.rules._passes import IGNORE
from plait.rules._recent_batches import Batch

Row = dict[str, Tensor]
"""One example: what the model is called with, without the batch axis; positions are "0", "1"."""
_FILLING = {"labels": IGNORE, "input_ids": 0, "attention_mask": 0, "position_ids": 0}
_OF_A_BATCH = {"logits_to_keep", "shift_labels", "num_items_in_batch"}  # not of its rows


class Reservoir:
    """At most `size` rows on the CPU; `seen` counts all that came by."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.seen = size, seed, 0
        self.rows: list[Row] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, batch: Batch) -> None:
        """Offer every row of a batch."""
        tensors = _tensors(batch)
        for index in range(rows_in(batch)):
            self.seen += 1
            place = self._place()
            if place is None:
                continue
            row = {name: t[index].detach().to("cpu", copy=True) for name, t in tensors.items()}
            self.rows[place : place + 1] = [row]

    def _place(self) -> int | None:
        if len(self.rows) < self.size:
            return len(self.rows)
        g = generator(self.seed, "reservoir", str(self.seen))
        drawn = int(torch.randint(self.seen, (), generator=g))
        return drawn if drawn < self.size else None

    def batch(self, indices: Sequence[int], like: Batch, device: torch.device) -> Batch:
        """The rows as one batch, padded on the right; what is no tensor comes from `like`."""
        chosen = [self.rows[i] for i in indices]
        names = list(chosen[0])
        if any(list(row) != names for row in chosen):
            raise PlaitError(
                f"the memory's rows are not called alike ({names} and others); begin a new memory."
            )
        made = {n: _stack(n, [row[n] for row in chosen]).to(device) for n in names}
        rest = {
            k: v
            for k, v in like[1].items()
            if not isinstance(v, Tensor) and k not in made and k not in _OF_A_BATCH
        }
        places = sorted((n for n in names if n.isdecimal()), key=int)
        named = {n: t for n, t in made.items() if not n.isdecimal()}
        return tuple(made[n] for n in places), {**rest, **named}

    # -- in checkpoints, and from run to run ----------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.rows = int(state["seen"]), [dict(row) for row in state["rows"]]

    def save(self, path: Path, **facts: int) -> None:
        """Write rows and whole numbers to a safetensors file, whole or not at all."""
        tensors = {f"{i}/{n}": t for i, r in enumerate(self.rows) for n, t in r.items()}
        numbers = {"seen": self.seen, "rows": len(self.rows), **facts}
        write_file(path, tensors_writer(tensors, {n: str(v) for n, v in numbers.items()}))

    def load(self, path: Path) -> dict[str, int]:
        """Take over what `save` wrote (a random part where there is less room); its numbers."""
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if "seen" not in facts or "rows" not in facts:
                raise FormatError(f"{path} holds no memory of training rows; name another file.")
            rows: list[Row] = [{} for _ in range(int(facts["rows"]))]
            for key in sorted(file.keys()):
                index, name = key.split("/", 1)
                rows[int(index)][name] = file.get_tensor(key)
        self.seen = int(facts["seen"])
        if len(rows) > self.size:
            g = generator(self.seed, "reservoir", "less")
            rows = [rows[i] for i in torch.randperm(len(rows), generator=g)[: self.size].tolist()]
        self.rows = rows
        return {name: int(value) for name, value in facts.items()}


def rows_in(batch: Batch) -> int:
    """The number of rows of a batch: the length of its first tensor."""
    for value in (*batch[0], *batch[1].values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
    return 0


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """What each row has a part of."""
    args, kwargs = batch
    named = {str(i): v for i, v in enumerate(args)} | dict(sorted(kwargs.items()))
    count = rows_in(batch)
    return {
        n: v
        for n, v in named.items()
        if isinstance(v, Tensor) and v.dim() > 0 and len(v) == count and n not in _OF_A_BATCH
    }


def _stack(name: str, parts: list[Tensor]) -> Tensor:
    if len({p.shape for p in parts}) == 1:
        return torch.stack(parts)
    if name not in _FILLING or any(p.dim() != 1 for p in parts):
        raise PlaitError(
            f"remembered {name!r} has rows of several shapes, which cannot be padded; give batches "
            "of one shape (no packing)."
        )
    return torch.nn.utils.rnn.pad_sequence(parts, True, float(_FILLING[name]))
