"""Pairs that a tied weight needs twice, stored once.

An embedding and the head tied to it change together: what is (A, B) on the table is (B^T, A^T) on
the head. `find_twins` sees such heads by their numbers, `plait.json` names them ("same": {site of
the head: site of the embedding}), and reading gives both sites tensors of their own again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plait.adapter.delta import Delta
from plait.errors import FormatError

PAIR = ("A", "B")


def find_twins(deltas: Mapping[str, Delta], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """{site of a linear: site of the embedding whose pair it has, transposed, bit for bit}."""
    pairs = {p: [tensors[f"{p}.{n}"] for n in PAIR] for p, d in deltas.items() if _only_a_pair(d)}
    tables = [p for p in pairs if deltas[p].site.kind == "embedding"]
    found = {}
    for path in pairs:
        if deltas[path].site.kind != "linear":
            continue
        like = (p for p in tables if deltas[p].site.shape == deltas[path].site.shape[::-1])
        if twin := next((p for p in like if _same(pairs[p], pairs[path])), None):
            found[path] = twin
    return found


def _only_a_pair(delta: Delta) -> bool:
    return sorted(name for name, _ in delta.own_tensors()) == [*PAIR]


def _same(table: list[Tensor], head: list[Tensor]) -> bool:
    """Whether they are each other's transposes; two that are only zeros say nothing."""
    (A, B), (C, D) = table, head
    alike = A.dtype == C.dtype and B.dtype == D.dtype and A.device == D.device
    return bool(alike and torch.equal(A.mT, D) and torch.equal(B.mT, C) and A.any() and B.any())


def without_twins(tensors: Mapping[str, Tensor], twins: Mapping[str, str]) -> dict[str, Tensor]:
    """What a file stores."""
    left_out = {f"{path}.{name}" for path in twins for name in PAIR}
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}


def with_twins(tensors: Mapping[str, Tensor], twins: Any) -> dict[str, Tensor]:
    """The file's tensors and those of the heads; FormatError for a description that does not
    fit."""
    found = dict(tensors)
    if not isinstance(twins, dict):
        raise FormatError("'same' must be a dict.")
    for path, table in twins.items():
        for name, other in zip(PAIR, reversed(PAIR), strict=True):
            source = tensors.get(f"{table}.{other}")
            if source is None or source.dim() != 2 or f"{path}.{name}" in tensors:
                raise FormatError(f"{path!r} cannot share the pair of {table!r}.")
            found[f"{path}.{name}"] = source.mT.contiguous()
    return found
