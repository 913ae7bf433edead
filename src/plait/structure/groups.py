"""Groups: units of a model that stand and fall together, and where their numbers lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plait.adapter.targets import block_index


@dataclass(frozen=True)
class Slot:
    """A dimension of one tensor on which a group's units lie.

    Its entries are `before` x units x `after`: entry (b, i, a) belongs to unit i.
    """

    tensor: str
    dim: int
    before: int = 1
    after: int = 1
    reads: bool = False
    """Whether the units come in there (a layer's inputs); else the tensor takes part in making
    them (outputs, a bias, a norm)."""

    @property
    def module(self) -> str:
        return self.tensor.rpartition(".")[0]

    def spread(self, units: Tensor) -> Tensor:
        """One value a unit as one value an entry of the dimension."""
        return units[None, :, None].expand(self.before, -1, self.after).flatten()

    def gather(self, entries: Tensor, size: int) -> Tensor:
        """The sum over each unit's entries: [dimension] to [size]."""
        return entries.reshape(self.before, size, self.after).sum((0, 2))


@dataclass(frozen=True)
class Group:
    """`size` units, none of which can be taken out of one slot and stay in another."""

    name: str
    size: int
    slots: tuple[Slot, ...]
    whole: bool
    """Its units are the outermost ones of all its slots: heads, not the channels within heads."""
    mixed: str = ""
    """What computes over all units together: then taking some out changes what the rest do."""

    @property
    def readers(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.reads]

    @property
    def blocks(self) -> set[int]:
        """Indices of the transformer blocks in which it has tensors."""
        found = (block_index(slot.tensor) for slot in self.slots)
        return {index for index in found if index is not None}

    @property
    def inner(self) -> bool:
        """Whether it lies within one block; the residual stream's width runs through all."""
        return len(self.blocks) < 2

    @property
    def separable(self) -> bool:
        """Whether its units are heads or channels of one block that can be switched off one by one,
        exactly as if they were not there."""
        return self.whole and self.inner and not self.mixed


@dataclass
class Structure:
    """The groups of a model by name, in the order in which it runs."""

    groups: dict[str, Group]
    refused: dict[str, str] = field(default_factory=dict)
    """{"tensor[dim]": why no unit can be taken out there}."""

    def entries(self, kept: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> Indices:
        """{tensor: {dim: indices that stay}} when of each group only the units `kept` (bool) do."""
        masks: dict[str, dict[int, Tensor]] = {}
        for name, units in kept.items():
            for slot in self.groups[name].slots:
                whole = torch.ones(shapes[slot.tensor][slot.dim], dtype=torch.bool)
                mask = masks.setdefault(slot.tensor, {}).setdefault(slot.dim, whole)
                mask &= slot.spread(units.cpu())
        return {t: {d: m.nonzero()[:, 0] for d, m in dims.items()} for t, dims in masks.items()}


Indices = dict[str, dict[int, Tensor]]
