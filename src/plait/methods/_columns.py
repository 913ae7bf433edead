"""A linear layer of which r columns train: backward keeps those features of x and nothing else.

    y = x W^T + b        dx = g W        dP = scaling * g^T x[..., I]

W already holds the trained columns W[:, I] = (its own) + scaling * P, so P takes no part in the
product; it is an input of the node only to receive its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from plait.kernels._gate import compute_dtype, exact_dtypes


def column_linear(
    x: Tensor,
    P: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    scaling: float,
    reached: Callable[[], None],
) -> Tensor:
    """x [..., in] through W [out, in] and b, with the gradient of P [out, r] at `columns` [r].

    `reached` is called whenever a backward pass computes P's gradient.
    """
    settings = (columns, scaling, reached, compute_dtype(x))
    return _ColumnLinear.apply(x, P, weight, bias, settings)


class _ColumnLinear(Function):
    @staticmethod
    def forward(ctx: Any, x, P, weight, bias, settings):
        columns, *_, dtype = settings
        inputs = x.to(dtype)
        with exact_dtypes(x.device.type):
            y = F.linear(inputs, weight.to(dtype), None if bias is None else bias.to(dtype))
        need_x, need_p = ctx.needs_input_grad[:2]
        flat = inputs.reshape(-1, x.shape[-1])
        picked = flat.index_select(1, columns) if need_p else None
        ctx.save_for_backward(picked, weight if need_x else None)
        ctx.settings, ctx.dtypes = settings, (x.dtype, P.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        picked, weight = ctx.saved_tensors
        _, scaling, reached, _ = ctx.settings
        grad_x = grad_p = None
        with exact_dtypes(grad.device.type):
            if weight is not None:
                grad_x = grad.matmul(weight.to(grad.dtype)).to(ctx.dtypes[0])
            if picked is not None:
                reached()
                grad_p = picked.t().mm(grad.reshape(-1, grad.shape[-1])) * scaling
                grad_p = grad_p.t().to(ctx.dtypes[1])
        return grad_x, grad_p, None, None, None
