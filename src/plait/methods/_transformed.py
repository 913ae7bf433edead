"""x dW^T where dW = out P in: two fast transforms with a sparse P of trained values between them.

    y = leave(P enter(x))        dx = back_leave(P^T back_enter(g))
    dP at position (a, b) = back_enter(g)_a . enter(x)_b

`back_enter` and `back_leave` are the transposes of `leave` and `enter`. Transformed tokens lie side
by side, [places, columns], as compressed rows are multiplied. Backward keeps x and the values.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from plait.kernels._gate import compute_dtype, exact_dtypes
from plait.methods._sparse import Layout


class Transform(Protocol):
    """The two transforms of an [out, in] site, on tokens [T, .], in float32 or float64."""

    def enter(self, x: Tensor) -> Tensor: ...

    def leave(self, S: Tensor) -> Tensor: ...

    def back_enter(self, g: Tensor) -> Tensor: ...

    def back_leave(self, S: Tensor) -> Tensor: ...


def transformed_linear(x: Tensor, values: Tensor, layout: Layout, transform: Transform) -> Tensor:
    """[..., out] from x [..., in], for `values` in the order of `layout`'s rows."""
    return _Transformed.apply(x, values, layout, transform, compute_dtype(x))


def _rows(x: Tensor, work: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(work)


class _Transformed(Function):
    @staticmethod
    def forward(ctx: Any, x, values, layout, transform, dtype):
        work = torch.promote_types(torch.promote_types(x.dtype, values.dtype), torch.float32)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values)
        ctx.settings = (layout, transform, work, x.dtype)
        with exact_dtypes(x.device.type):
            P = layout.by_rows(values.to(work))
            y = transform.leave(P @ transform.enter(_rows(x, work)))
        return y.to(dtype).contiguous().view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, values = ctx.saved_tensors
        layout, transform, work, x_dtype = ctx.settings
        grad_x = grad_values = None
        with exact_dtypes(grad.device.type):
            V = transform.back_enter(_rows(grad, work))
            if ctx.needs_input_grad[0]:
                back = transform.back_leave(layout.by_columns(values.to(work)) @ V)
                grad_x = back.to(x_dtype).contiguous().view(*grad.shape[:-1], -1)
            if x is not None:
                U, empty = transform.enter(_rows(x, work)), layout.by_rows(values.to(work))
                found = torch.sparse.sampled_addmm(empty, V, U.t(), beta=0.0)
                grad_values = found.values().to(values.dtype)
        return grad_x, grad_values, None, None, None
