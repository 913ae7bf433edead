"""Per-channel scaling of activations in one autograd node: what DoRA and (IA)^3 share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from plait.kernels._gate import plain_path


def rescale(y: Tensor, change: Tensor) -> Tensor:
    """y * (1 + change) for y [..., n] and change [n], in y's dtype.

    The scale is given by its distance from 1, which half precision keeps where 1.001 would round
    to 1. One pass forward and one node that saves y, where `y + y * change` takes two of each.
    """
    if plain_path(y, change):
        return y + y * change.to(y.dtype)
    return _Rescale.apply(y, change)


class _Rescale(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, change: Tensor) -> Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, change)
        return torch.addcmul(y, y, change.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        y, change = ctx.saved_tensors
        grad_y = grad_change = None
        if ctx.needs_input_grad[0]:
            grad_y = torch.addcmul(grad, grad, change.to(grad.dtype))
        if ctx.needs_input_grad[1]:
            rows = (grad * y).reshape(-1, y.shape[-1])
            grad_change = rows.sum(0, dtype=change.dtype)
        return grad_y, grad_change
