"""A linear layer with the Hadamard product of two low-rank matrices in its weight.

    y = x (W + s (w1_a w1_b) * (w2_a w2_b))^T + b

The product has no shape but the weight's own: it is formed in forward, again in backward, and
nothing of that size is kept in between. A training step costs three products of the size of x W^T
(the gradient of the sum is g^T x), where a low-rank change costs two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from plait.kernels._gate import compute_dtype, exact_dtypes, plain_path

Factors = tuple[Tensor, Tensor, Tensor, Tensor]
"""w1_a [out, r], w1_b [r, in], w2_a [out, r], w2_b [r, in]."""


def hadamard(factors: Factors, scale: float = 1.0) -> Tensor:
    """scale * (w1_a w1_b) * (w2_a w2_b) [out, in]."""
    w1_a, w1_b, w2_a, w2_b = factors
    return (scale * w1_a @ w1_b) * (w2_a @ w2_b)


def hadamard_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, factors: Factors, scale: float
) -> Tensor:
    """x (weight + the product)^T + bias for x [..., in]; weight None stands for zero."""
    dtype = x.dtype if plain_path(x, *factors) else compute_dtype(x)
    if plain_path(x, weight, *factors):
        total = hadamard(factors, scale).to(dtype)
        return F.linear(x, total if weight is None else weight + total, bias)
    return _HadamardLinear.apply(x, weight, bias, scale, dtype, *factors)


def _total(weight: Tensor | None, factors: Factors, scale: float, dtype: torch.dtype) -> Tensor:
    total = hadamard(factors, scale).to(dtype)
    return total if weight is None else total.add_(weight)


class _HadamardLinear(Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, scale, dtype, *factors):
        inputs = x.to(dtype)
        ctx.save_for_backward(inputs, weight, *factors)
        ctx.settings = scale, dtype, x.dtype
        with exact_dtypes(x.device.type):
            return F.linear(inputs, _total(weight, factors, scale, dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, weight, *factors = ctx.saved_tensors
        scale, dtype, x_dtype = ctx.settings
        w1_a, w1_b, w2_a, w2_b = factors
        g = grad.to(dtype).reshape(-1, grad.shape[-1])
        grad_x = None
        with exact_dtypes(g.device.type):
            if ctx.needs_input_grad[0]:
                total = _total(weight, (w1_a, w1_b, w2_a, w2_b), scale, dtype)
                grad_x = g.mm(total).view(x.shape).to(x_dtype)
                del total
            of_sum = g.t().mm(x.reshape(-1, x.shape[-1])).to(w1_a.dtype).mul_(scale)
            left = (w2_a @ w2_b).mul_(of_sum)  # the gradient of w1_a w1_b
            grad_1 = left @ w1_b.t(), w1_a.t() @ left
            del left
            right = (w1_a @ w1_b).mul_(of_sum)
            grad_2 = right @ w2_b.t(), w2_a.t() @ right
        return grad_x, None, None, None, None, *grad_1, *grad_2
