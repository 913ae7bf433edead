"""Which units go: the least important of every group, or of all groups together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.rules._prunable import best_units
from plait.structure import Group

Scope = Literal["local", "global"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass(frozen=True)
class Share:
    """How much goes: see `prune`."""

    ratio: float
    scope: Scope
    steps: int
    multiple: int

    def __post_init__(self) -> None:
        check_choices(self, "prune")
        if not 0 <= self.ratio < 1 or self.steps < 1 or self.multiple < 1:
            raise PlaitError("prune: ratio lies in [0, 1), steps and multiple are at least 1.")


def kind(group: Group) -> tuple[object, ...]:
    """The same for groups that differ only in the block they stand in."""
    slots = tuple((_NUMBER.sub("*", s.tensor), s.dim, s.before, s.after) for s in group.slots)
    return (group.size, *slots)


def staying(size: int, ratio: float, multiple: int) -> int:
    """How many of `size` units stay without a share `ratio`: at least one, and a multiple where
    that is asked for and the group has so many."""
    left = size - int(ratio * size + 1e-9)
    if multiple > 1 and size > multiple:
        left = max(multiple, left // multiple * multiple)
    return max(1, left)


def lowest_of_each(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    on: Mapping[str, Tensor],
    ratio: float,
    multiple: int,
) -> dict[str, Tensor]:
    """{group: which units stay, bool [size]}; what is off in `on` stays off."""
    found = {}
    for group in groups:
        off = group.size - staying(group.size, ratio, multiple)
        found[group.name] = best_units(scores[group.name], on[group.name], off)
    return found


def lowest_of_all(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    on: Mapping[str, Tensor],
    ratio: float,
    prices: Mapping[str, int],
) -> dict[str, Tensor]:
    """As above, the units of least importance for their parameters first, wherever they are, until
    a share `ratio` of all groups' parameters is gone. Every group keeps its best unit.

    prices: {group: parameters of one unit}.
    """
    order: list[tuple[float, str, int]] = []
    gone, total = 0.0, 0.0
    found = {group.name: on[group.name].clone() for group in groups}
    for group in groups:
        price, score = prices[group.name], scores[group.name]
        total += group.size * price
        gone += price * int((~on[group.name]).sum())
        best = int(score.masked_fill(~on[group.name], -torch.inf).argmax())
        alive = [i for i in on[group.name].nonzero()[:, 0].tolist() if i != best]
        order += [(float(score[i]) / price, group.name, i) for i in alive]
    for _, name, i in sorted(order):
        if gone >= ratio * total:
            break
        found[name][i] = False
        gone += prices[name]
    return found


def unit_price(group: Group, shapes: Mapping[str, torch.Size]) -> int:
    """Parameters that go with one unit."""
    return sum(
        int(shapes[s.tensor].numel()) // shapes[s.tensor][s.dim] * s.before * s.after
        for s in group.slots
    )
