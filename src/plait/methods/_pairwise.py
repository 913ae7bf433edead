"""2 x 2 maps on pairs of channels, in one autograd node: what rotating outputs in pairs costs.

Channels come in groups, and channel k of a group's first half is paired with k of its second:

    z_1 = y_1 + c_1 y_1 - d_1 y_2        z_2 = y_2 + c_2 y_2 + d_2 y_1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from plait.kernels._gate import plain_path


def turned(y: Tensor, group: int) -> Tensor:
    """(-y_2, y_1) in place of (y_1, y_2), along the last axis."""
    first, second = y.unflatten(-1, (-1, 2, group // 2)).unbind(-2)
    return torch.stack([-second, first], -2).view(y.shape)


def turn_pairs(y: Tensor, c: Tensor, d: Tensor, group: int) -> Tensor:
    """y + c y + d turned(y) for y [..., n] and c, d [n], in y's dtype.

    `c` is a scale's distance from 1, which half precision keeps where 1.001 would round to 1.
    """
    if plain_path(y, c, d):
        return y + c.to(y.dtype) * y + d.to(y.dtype) * turned(y, group)
    return _TurnPairs.apply(y, c, d, group)


def _halves(t: Tensor, group: int) -> tuple[Tensor, ...]:
    return t.view(*t.shape[:-1], -1, 2, group // 2).unbind(-2)


def _turn(y: Tensor, c: Tensor, d: Tensor, group: int) -> Tensor:
    """y + c y + d turned(y), or with -d for the gradient, in three passes and no temporary."""
    z = torch.addcmul(y, y, c)
    (z1, z2), (y1, y2), (d1, d2) = (_halves(t, group) for t in (z, y, d))
    z1.addcmul_(y2, d1, value=-1)
    z2.addcmul_(y1, d2)
    return z


class _TurnPairs(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, c: Tensor, d: Tensor, group: int) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(y if any(ctx.needs_input_grad[1:3]) else None, c, d)
        return _turn(y.contiguous(), c.to(y.dtype), d.to(y.dtype), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, c, d = ctx.saved_tensors
        grad, group = grad.contiguous(), ctx.group
        grad_y = grad_c = grad_d = None
        if ctx.needs_input_grad[0]:
            # The transposed map: y_1 has come into z_2 by d_2, and y_2 into z_1 by -d_1.
            d1, d2 = _halves(d, group)
            swapped = torch.stack([-d2, -d1], -2).view(d.shape)
            grad_y = _turn(grad, c.to(grad.dtype), swapped.to(grad.dtype), group)
        if y is not None:
            flat = grad.reshape(-1, grad.shape[-1])
            grad_c = (flat * y.reshape(flat.shape)).sum(0, dtype=c.dtype)
            (g1, g2), (y1, y2) = _halves(flat, group), _halves(y.reshape(flat.shape), group)
            parts = [-(g1 * y2).sum(0, dtype=d.dtype), (g2 * y1).sum(0, dtype=d.dtype)]
            grad_d = torch.stack(parts, -2).view(d.shape)
        return grad_y, grad_c, grad_d, None
