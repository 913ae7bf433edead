"""What routers need beside x, and what they add to the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter.state import find_state, get_state


@contextlib.contextmanager
def routing(model: nn.Module, **values: Any) -> Iterator[None]:
    """Give routers what they need beside x (`task=`, `attention_mask=`, ...) within the block."""
    context = get_state(model).context
    before = dict(context.values)
    context.values.update(values)
    try:
        yield
    finally:
        context.values = before


def auxiliary_loss(model: nn.Module) -> Tensor | float:
    """The sum of what the active adapters' routers add to the task loss (0.0 when none does)."""
    state = find_state(model)
    if state is None:
        return 0.0
    losses = [state.adapters[name].auxiliary_loss() for name in state.active]
    found = [loss for loss in losses if loss is not None]
    return torch.stack(found).sum() if found else 0.0
