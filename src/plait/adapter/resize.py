"""Replacing a parameter by one of another size, with its optimiser state carried along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def replace_parameter(
    module: nn.Module, name: str, index: Tensor, axis: int, extra: Tensor, optimizer: Any = None
) -> nn.Parameter:
    """Replace `module.name` by its slices `index` along `axis`, followed by `extra`.

    Optimiser state of the parameter's shape (moments) follows its components; new components start
    with zero state. A new Parameter object is made (autograd keeps shapes per object), and it takes
    the old one's place in the optimiser's groups. Returns the new parameter.
    """
    old = module.get_parameter(name)

    def carry(value: Tensor, tail: Tensor) -> Tensor:
        return torch.cat([value.index_select(axis, index.to(value.device)), tail.to(value)], axis)

    new = nn.Parameter(carry(old.detach(), extra), requires_grad=old.requires_grad)
    module._parameters[name] = new
    if optimizer is not None:
        _swap_in_optimizer(getattr(optimizer, "optimizer", optimizer), old, new, carry, extra)
    return new


def _swap_in_optimizer(
    optimizer: Any, old: nn.Parameter, new: nn.Parameter, carry: Any, extra: Tensor
) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    tail = torch.zeros_like(extra)
    optimizer.state[new] = {
        key: carry(value, tail) if isinstance(value, Tensor) and value.shape == old.shape else value
        for key, value in state.items()
    }
