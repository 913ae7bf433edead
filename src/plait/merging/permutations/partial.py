"""Merging two networks in part: matched units that are alike become one, the others both stay.

    a group's new order:  merged | only the first's | only the second's       width d (1 + ratio)

                        reads merged      reads first's own    reads second's own
    merged unit         w_1 W_1 + w_2 W_2     w_1 W_1              w_2 W_2
    first's own         W_1                   W_1                  0
    second's own        W_2                   0                    W_2

At ratio 0 this is the average of matched networks, at 1 both run side by side and their outputs are
averaged. Nasery et al., 2024, arXiv 2407.02447.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plait.errors import PlaitError, unknown
from plait.merging.permutations.assignment import most_alike
from plait.merging.permutations.groups import (
    Group,
    Slot,
    check_tensors,
    entries,
    owners,
    rebuilt,
    tensors_of,
)
from plait.merging.permutations.matching import Matching


@dataclass(frozen=True)
class Split:
    """What becomes of a group's units: pairs [m, 2] (unit of the first, of the second) and the
    units that either keeps for itself."""

    pairs: Tensor
    alone: tuple[Tensor, Tensor]

    @property
    def width(self) -> int:
        return len(self.pairs) + len(self.alone[0]) + len(self.alone[1])

    def sources(self, side: int) -> Tensor:
        """Units of this network in the new order, its own part only: merged, then alone."""
        return torch.cat([self.pairs[:, side], self.alone[side]])

    def places(self, side: int) -> Tensor:
        """Where they stand in the new order."""
        start = len(self.pairs) + (len(self.alone[0]) if side else 0)
        own = torch.arange(start, start + len(self.alone[side]))
        return torch.cat([torch.arange(len(self.pairs)), own])


def split_units(
    groups: Sequence[Group], matching: Matching, ratios: float | Mapping[str, float]
) -> dict[str, Split]:
    """The pairs most alike are merged, a share `ratio` of each group's units stays separate.

    A single number counts for every group that can be widened; a mapping names groups (those that
    it lacks are merged whole).
    """
    if isinstance(ratios, Mapping):
        for name in ratios:
            if name not in {g.name for g in groups}:
                raise unknown("group", name, [g.name for g in groups])
    found = {}
    for group in groups:
        ratio = _ratio(group, ratios)
        order = matching.order[group.name]
        merged = most_alike(matching.similarity[group.name], ratio)
        units = torch.arange(group.size)
        pairs = torch.stack([units[merged], order[merged]], 1)
        found[group.name] = Split(pairs, (units[~merged], order[~merged].sort().values))
    return found


def _ratio(group: Group, ratios: float | Mapping[str, float]) -> float:
    named = isinstance(ratios, Mapping)
    ratio = ratios.get(group.name, 0.0) if isinstance(ratios, Mapping) else ratios
    if not 0 <= ratio <= 1:
        raise PlaitError(f"group {group.name!r}: ratio is a share in [0, 1], not {ratio}.")
    if ratio and not group.widens:
        if named:
            raise PlaitError(
                f"group {group.name!r} cannot be widened, since a norm takes its mean over all of "
                "its units; leave its ratio at 0."
            )
        return 0.0
    return ratio


def check_shares(weights: tuple[float, float]) -> None:
    if min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise PlaitError(f"weights {weights} of two networks are not negative and add up to 1.")


def partial_merge(
    one: nn.Module,
    two: nn.Module,
    groups: Sequence[Group],
    splits: Mapping[str, Split],
    weights: tuple[float, float] = (0.5, 0.5),
) -> nn.Module:
    """A copy of `one` with merged tensors; what no group owns is averaged as it stands.

    Modules are told their new sizes. A model's config is not: a checkpoint of widened layers loads
    into this module, not into one that is made from the config.
    """
    check_shares(weights)
    first, second = tensors_of(one), tensors_of(two)
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())[0]
        raise PlaitError(f"the networks differ: only one of them has a tensor {odd!r}.")
    for tensors in (first, second):
        check_tensors(tensors, groups)
    owned, made = owners(groups), {}
    for name, tensor in first.items():
        if tensor.is_floating_point():
            axes = {a: (splits[g.name], slot) for a, (g, slot) in owned.get(name, {}).items()}
            made[name] = merge_tensor((tensor, second[name]), axes, weights, name)
    return rebuilt(one, made)


def merge_tensor(
    both: tuple[Tensor, Tensor],
    axes: Mapping[int, tuple[Split, Slot]],
    weights: tuple[float, float],
    name: str = "",
) -> Tensor:
    """One tensor of the merged network, float64 on the CPU."""
    writing = [axis for axis, (_, slot) in axes.items() if not slot.reads]
    total: Tensor | None = None
    for side, (tensor, weight) in enumerate(zip(both, weights, strict=True)):
        piece = tensor.detach().to("cpu", torch.float64)
        if not writing:  # outputs whose order has a meaning are merged as they stand
            piece = piece * weight
        for axis, (split, slot) in axes.items():
            units, places = split.sources(side), split.places(side)
            piece = piece.index_select(axis, entries(units, slot.span))
            if axis in writing[:1]:
                shares = torch.ones(len(units), dtype=torch.float64)
                shares[: len(split.pairs)] = weight
                shape = [-1 if a == axis else 1 for a in range(piece.dim())]
                piece = piece * shares.repeat_interleave(slot.span).view(shape)
            size = list(piece.shape)
            size[axis] = split.width * slot.span
            wide = torch.zeros(size, dtype=torch.float64)
            piece = wide.index_copy(axis, entries(places, slot.span), piece)
        if total is not None and total.shape != piece.shape:
            raise PlaitError(
                f"tensor {name!r} is {list(both[0].shape)} in one network and "
                f"{list(both[1].shape)} in the other."
            )
        total = piece if total is None else total + piece
    assert total is not None
    return total


def refresh_batch_norms(model: nn.Module, batches: object) -> None:
    """Run the batches so that batch norms take the merged network's own means and variances.

    Averaged ones fit neither network: merging shrinks the variance of what it averages.
    """
    from plait.statistics.frozen import to_device

    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    if not norms:
        return
    training, device = model.training, next(model.parameters()).device
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    with torch.no_grad():
        for batch in batches:  # type: ignore[attr-defined]
            here = to_device(batch, device)
            model(**{k: v for k, v in here.items() if k != "labels"})
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(training)
