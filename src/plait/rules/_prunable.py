"""Which groups of units may be pruned while an adapter trains, and which of their units go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Pair
from plait.errors import PlaitError
from plait.structure import Group, Structure


def trained_groups(
    structure: Structure, pairs: Sequence[Pair], first: float, last: int
) -> list[Group]:
    """Heads and channels with a trained pair at one of their layers, without those of the `first`
    blocks (a share of all below 1) and of the `last`; PlaitError where none is left."""
    groups = [group for group in structure.groups.values() if group.separable]
    blocks = sorted({index for group in groups for index in group.blocks})
    front = int(first * len(blocks)) if first < 1 else int(first)
    spared = {*blocks[:front], *(blocks[-last:] if last else [])}
    weights = {f"{pair.path}.weight" for pair in pairs}
    found = [
        group
        for group in groups
        if not group.blocks & spared and any(slot.tensor in weights for slot in group.slots)
    ]
    if not found:
        raise PlaitError(
            "lora-prune: no head or channel that could go has a trained pair at its layers; widen "
            "`targets`, or lower first= and last=."
        )
    return found


def best_units(scores: Tensor, kept: Tensor, off: int) -> Tensor:
    """Which units stay, bool [size], when `off` are to be off: of those that are on, the best. One
    always stays."""
    count = max(1, min(len(kept) - off, int(kept.sum())))
    best = scores.masked_fill(~kept, -torch.inf).argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(kept).index_fill_(0, best, True)


def few_rows(held_out: Sequence[Any] | None) -> dict[str, Any] | None:
    """Two rows of held-out data, which suffice to follow a model; None where there are none."""
    first = held_out[0] if held_out else None
    if not isinstance(first, dict):
        return None
    return {k: v[:2] if isinstance(v, Tensor) and v.dim() else v for k, v in first.items()}
