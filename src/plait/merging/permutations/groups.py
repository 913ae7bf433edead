"""Groups: the hidden units of a network that may change places without changing what it computes.

    group "0" of  Linear(64, 128), ReLU, Linear(128, 10):
        units 0 .. 127     written by rows of weight 0 and entries of bias 0, read by columns of 2

A group is a list of slots, axes of tensors on which its units lie. Reordering all of them by one
permutation leaves the network as it is, which `permute` does and `check_groups` tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter.state import find_state
from plait.errors import PlaitError


@dataclass(frozen=True)
class Slot:
    """An axis of one tensor on which a group's units lie, `span` neighbouring entries each."""

    tensor: str
    axis: int
    reads: bool = False
    """Whether the units come in there (a weight's inputs); else the tensor is part of what makes
    them (a weight's outputs, a bias, a norm)."""
    span: int = 1


@dataclass(frozen=True)
class Group:
    """Units that change places together."""

    name: str
    size: int
    slots: tuple[Slot, ...]
    widens: bool = True
    """Whether units may be added: not where a norm takes its mean over all of them."""


Owners = dict[str, dict[int, tuple[Group, Slot]]]


def owners(groups: Sequence[Group]) -> Owners:
    """{tensor: {axis: (group, slot)}}; an axis belongs to one group."""
    found: Owners = {}
    for group in groups:
        for slot in group.slots:
            axes = found.setdefault(slot.tensor, {})
            if slot.axis in axes:
                raise PlaitError(
                    f"axis {slot.axis} of {slot.tensor!r} belongs to the groups "
                    f"{axes[slot.axis][0].name!r} and {group.name!r}; an axis has one."
                )
            axes[slot.axis] = (group, slot)
    return found


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; of shared ones the first name."""
    if find_state(model) is not None:
        raise PlaitError("the network has adapters; fuse and detach them before networks merge.")
    found = dict(model.named_parameters())
    return found | dict(model.named_buffers())


def check_tensors(tensors: Mapping[str, Tensor], groups: Sequence[Group]) -> None:
    """PlaitError for a slot that these tensors do not have, or that has another length."""
    for group in groups:
        for slot in group.slots:
            shape = tuple(tensors[slot.tensor].shape) if slot.tensor in tensors else ()
            length = shape[slot.axis] if slot.axis < len(shape) else 0
            if length != group.size * slot.span:
                raise PlaitError(
                    f"group {group.name!r} has {group.size} units of {slot.span}, but axis "
                    f"{slot.axis} of {slot.tensor!r} is {length or 'not there'}."
                )


def entries(units: Tensor, span: int) -> Tensor:
    """The places on an axis that these units take."""
    return (units[:, None] * span + torch.arange(span)).flatten()


def by_units(tensor: Tensor, slot: Slot, size: int) -> Tensor:
    """[size, the rest]: a tensor cut along a slot's axis into its units."""
    rows = tensor.detach().to("cpu", torch.float64).movedim(slot.axis, 0)
    return rows.reshape(size, -1)


def reorder(tensor: Tensor, axes: Mapping[int, tuple[Group, Slot]], order: Any) -> Tensor:
    """The tensor with unit order[group][i] at place i; groups that `order` lacks stay."""
    for axis, (group, slot) in axes.items():
        if group.name in order:
            places = entries(order[group.name], slot.span).to(tensor.device)
            tensor = tensor.index_select(axis, places)
    return tensor


def permute(model: nn.Module, groups: Sequence[Group], order: Mapping[str, Tensor]) -> nn.Module:
    """A copy that computes the same, with unit order[group][i] at place i of every group."""
    tensors = tensors_of(model)
    check_tensors(tensors, groups)
    owned = owners(groups)
    return rebuilt(model, {n: reorder(tensors[n].detach(), owned[n], order) for n in owned})


def rebuilt(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the network with these tensors, also of other shapes; shared ones stay shared."""
    made = copy.deepcopy(model)
    replaced: dict[int, Tensor] = {}
    old = dict(made.named_parameters()) | dict(made.named_buffers())
    for name, value in values.items():
        before = old[name]
        new: Tensor = value.to(before.device, before.dtype).contiguous()
        if isinstance(before, nn.Parameter):
            new = nn.Parameter(new, requires_grad=before.requires_grad)
        replaced[id(before)] = new
    for module in made.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None and id(tensor) in replaced:
                    held[key] = replaced[id(tensor)]  # type: ignore[assignment]
        _tell_sizes(module)
    return made


def _tell_sizes(module: Any) -> None:
    """What a module remembers of its weight's shape, brought up to date."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        module.out_channels, module.in_channels = weight.shape[:2]
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        module.num_features = len(weight)
    elif hasattr(module, "nf"):
        module.nx, module.nf = weight.shape


def check_groups(
    model: nn.Module,
    groups: Sequence[Group],
    run: Callable[[nn.Module], Tensor],
    *,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> None:
    """PlaitError, naming the group, where reordering its units changes `run(model)`."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        before = run(model)
        for group in groups:
            order = {group.name: torch.randperm(group.size, generator=g)}
            after = run(permute(model, groups, order))
            if float((after - before).abs().max()) > tolerance * float(before.abs().max()):
                raise PlaitError(
                    f"reordering the units of group {group.name!r} changes the network: a tensor "
                    "that holds them is missing from its slots, or their order has a meaning."
                )
