"""Which unit of one network is which of another: a permutation for every group.

By weights: C_g[i, j] sums the inner products of everything that makes and reads unit i of the first
and unit j of the second, the other groups in their present order; the groups are assigned one after
the other until nothing changes. By activations: C_g[i, j] is the correlation of the two units on
the same inputs, so groups do not depend on each other.
Ainsworth et al., 2022, arXiv 2209.04836; Li et al., 2015, arXiv 1511.07543.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from plait.errors import PlaitError, unknown
from plait.merging.permutations.assignment import best_pairs
from plait.merging.permutations.groups import (
    Group,
    Owners,
    Slot,
    by_units,
    check_tensors,
    owners,
    reorder,
    tensors_of,
)

By = Literal["weights", "activations"]


@dataclass(frozen=True)
class Matching:
    """For each group the unit of the second network that is unit i of the first, [size]."""

    order: dict[str, Tensor]
    similarity: dict[str, Tensor]
    """C[i, order[i]], [size]: what pairs are chosen by."""
    cosine: dict[str, Tensor]
    """The same between -1 and 1, [size]."""
    sweeps: int = 0
    """Over all groups until nothing changed; 0 by activations."""


def match(
    one: nn.Module,
    two: nn.Module,
    groups: Sequence[Group],
    by: By = "weights",
    moments: Mapping[str, Tensor] | None = None,
    *,
    sweeps: int = 100,
    seed: int = 0,
) -> Matching:
    """The permutations that bring the units of `two` into the order of `one`.

    Args:
        by: "weights", or "activations", for which `moments` are needed (see `joint_moments`).
        sweeps: over the groups at most, by weights.
        seed: of the order in which groups are assigned after the first sweep.

    The first sweep goes through the groups in their order and looks only at tensors whose other
    units are in order already, so that a reordered copy is not lost among units still shuffled.
    """
    if by == "activations":
        return _by_activations(groups, moments)
    if by != "weights":
        raise unknown("matching", by, ("weights", "activations"))
    both = tensors_of(one), tensors_of(two)
    for tensors in both:
        check_tensors(tensors, groups)
    search = _Weights(both[0], both[1], owners(groups))
    order: dict[str, Tensor] = {}
    for group in groups:
        order[group.name] = best_pairs(search.similarity(group, order, known=True))[1]
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for sweep in range(1, sweeps + 1):
        done, moved = sweep, False
        for index in torch.randperm(len(groups), generator=generator).tolist():
            group = groups[index]
            C = search.similarity(group, order)
            better = best_pairs(C)[1]
            rows = torch.arange(group.size)
            gain = (C[rows, better] - C[rows, order[group.name]]).sum()
            if float(gain) > 1e-9 * float(C.abs().max()):
                order[group.name], moved = better, True
        if not moved:
            break
    found = [search.similarity(group, order) for group in groups]
    return _matching(groups, order, found, search.lengths(groups), done)


class _Weights:
    def __init__(self, one: Mapping[str, Tensor], two: Mapping[str, Tensor], owned: Owners) -> None:
        # Running statistics say nothing that the weights do not.
        self.one = {n: t for n, t in one.items() if isinstance(t, nn.Parameter)}
        self.two, self.owned = two, owned

    def similarity(self, group: Group, order: Mapping[str, Tensor], known: bool = False) -> Tensor:
        """C [size, size]; with `known` only of tensors whose other groups `order` has already."""
        slots = [slot for slot in group.slots if slot.tensor in self.one]
        if known:
            settled = [s for s in slots if all(o in order for o in self._others(s))]
            slots = settled or slots
        total = torch.zeros(group.size, group.size, dtype=torch.float64)
        for slot in slots:
            axes = {a: o for a, o in self.owned[slot.tensor].items() if a != slot.axis}
            turned = reorder(self.two[slot.tensor].detach(), axes, order)
            total += (
                by_units(self.one[slot.tensor], slot, group.size)
                @ by_units(turned, slot, group.size).mT
            )
        return total

    def _others(self, slot: Slot) -> list[str]:
        axes = self.owned[slot.tensor].items()
        return [group.name for axis, (group, _) in axes if axis != slot.axis]

    def lengths(self, groups: Sequence[Group]) -> list[tuple[Tensor, Tensor]]:
        """The norms [size] of all that makes and reads a unit, in either network."""
        found = []
        for group in groups:
            slots = [slot for slot in group.slots if slot.tensor in self.one]
            sides = [
                sum(by_units(side[s.tensor], s, group.size).square().sum(1) for s in slots)
                for side in (self.one, self.two)
            ]
            found.append((sides[0].sqrt(), sides[1].sqrt()))  # type: ignore[union-attr]
        return found


def _by_activations(groups: Sequence[Group], moments: Mapping[str, Tensor] | None) -> Matching:
    order, found = {}, []
    for group in groups:
        C = torch.zeros(group.size, group.size, dtype=torch.float64)
        readers = [s for s in group.slots if s.reads and s.tensor.endswith(".weight")]
        seen = [(s, (moments or {}).get(s.tensor.removesuffix(".weight"))) for s in readers]
        known = [(s, M) for s, M in seen if M is not None]
        if not known:
            raise PlaitError(
                f"matching by activations: no moments of a layer that reads group {group.name!r}; "
                "make them with joint_moments, or match by weights."
            )
        for slot, M in known:
            C += _correlation(M, group.size, slot.span)
        C /= len(known)
        order[group.name] = best_pairs(C)[1]
        found.append(C)
    ones = [(torch.ones(g.size).double(), torch.ones(g.size).double()) for g in groups]
    return _matching(groups, order, found, ones, 0)


def _correlation(M: Tensor, size: int, span: int) -> Tensor:
    """Of every unit of the first with every unit of the second, [size, size]."""
    d = (len(M) - 1) // 2
    mean = M[-1, :-1]
    covariance = M[:-1, :-1] - mean[:, None] * mean
    # A unit of several entries counts as the vector of them.
    units = covariance.view(2, size, span, 2, size, span).diagonal(dim1=2, dim2=5).sum(-1)
    assert d == size * span
    own = [units[i, :, i].diagonal().clamp_min(0).sqrt() for i in (0, 1)]
    lengths = own[0][:, None] * own[1]
    return torch.where(lengths > 0, units[0, :, 1] / torch.where(lengths > 0, lengths, 1), 0)


def _matching(
    groups: Sequence[Group],
    order: dict[str, Tensor],
    similarities: Sequence[Tensor],
    lengths: Sequence[tuple[Tensor, Tensor]],
    sweeps: int,
) -> Matching:
    alike, cosine = {}, {}
    for group, C, (a, b) in zip(groups, similarities, lengths, strict=True):
        chosen = order[group.name]
        alike[group.name] = C[torch.arange(group.size), chosen]
        norms = a * b[chosen]
        cosine[group.name] = torch.where(
            norms > 0, alike[group.name] / torch.where(norms > 0, norms, 1), 0
        ).clamp(-1, 1)
    return Matching(order, alike, cosine, sweeps)
