"""The LoRA linear as one autograd node: base product, A product, in-place B product.

    y = x W^T + b + scale * (drop(x) A^T) B^T

Written as separate operations, LoRA's cost is memory traffic: two extra passes over y, fresh
temporaries of y's size, three more nodes a layer. Here B's product is accumulated into the fresh
base output, backward accumulates A's part into the fresh base gradient, scale rides on the [T, r]
side, and only x and u = x A^T are kept. Dropout masks are drawn again in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from plait.kernels import dispatch, reference
from plait.kernels._gate import compute_dtype, exact_dtypes, plain_path
from plait.kernels._lowrank import fold_plan, gain, gradient_of_b, project, pull_back, push_back
from plait.kernels.dropout import Dropout, make_dropout


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    *,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """x W^T + b + scale * (drop(x) A^T) B^T in one autograd node that keeps x and x A^T only.

    Differentiable once in x, A and B. Takes the plain path of `reference.lora_linear` when the
    weight or bias is trained, under a compiler, a functorch transform or `use_reference()`.

    Args:
        x: [..., in].
        weight: [out, in], of any strides; frozen for the fused path.
        bias: [out] or None.
        A: [r, in] and B: [out, r], in any floating dtype; they are cast to the dtype of the base
            product (they are small), and their gradients come back in their own dtype.
        scale: the factor on the low-rank part (alpha / r for plain LoRA).
        dropout: probability with which an entry of x is dropped for A, in [0, 1).
        seed: of the dropout mask; None draws one from PyTorch's CPU generator.

    Returns:
        [..., out], in the dtype of `F.linear(x, weight, bias)`.
    """
    grad = torch.is_grad_enabled()
    trained = grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if trained or plain_path(x, weight, A, B):
        return reference.lora_linear(x, weight, bias, A, B, scale, dropout=dropout, seed=seed)
    if A.shape[0] == 0:
        return F.linear(x, weight, bias)
    drop = make_dropout(dropout, seed)
    run = dispatch.find("lora_linear", x.device.type)
    if run is not None:
        return run(x, weight, bias, A, B, scale, drop)
    dtype = compute_dtype(x, weight)
    if grad and (x.requires_grad or A.requires_grad or B.requires_grad):
        return _LoraLinear.apply(x, weight, bias, A, B, scale, drop, dtype)
    with exact_dtypes(x.device.type):
        return _product(x.to(dtype), weight, bias, A, B, scale, drop)[0]


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    drop: Dropout | None,
) -> tuple[Tensor, Tensor]:
    """(y, u), in the dtype of x."""
    dtype = x.dtype
    y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    u = project(x.reshape(-1, x.shape[-1]), A.to(dtype), drop)
    y.view(-1, y.shape[-1]).addmm_(u.t(), B.to(dtype).t(), alpha=gain(scale, drop))
    return y, u


def _folded(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, u, W + scale B A), in the dtype of x."""
    dtype = x.dtype
    total = torch.addmm(weight, B.to(dtype), A.to(dtype), alpha=scale)
    y = F.linear(x, total, None if bias is None else bias.to(dtype))
    return y, project(x.reshape(-1, x.shape[-1]), A.to(dtype), None), total


class _LoraLinear(Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, A, B, scale, drop, dtype):
        inputs = x.to(dtype)
        fold, keep = fold_plan(inputs, [weight], [A], drop)
        with exact_dtypes(x.device.type):
            if fold:
                y, u, total = _folded(inputs, weight, bias, A, B, scale)
                weight = total if keep else weight
            else:
                y, u = _product(inputs, weight, bias, A, B, scale, drop)
        need_x, need_a, need_b = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        ctx.save_for_backward(
            inputs if need_a else None, u if need_b else None, weight if need_x else None, A, B
        )
        ctx.settings = (gain(scale, drop), drop, keep, x.shape, x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        need_x, need_a, need_b = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        x, u, weight, A, B = ctx.saved_tensors
        alpha, drop, whole, x_shape, x_dtype = ctx.settings
        g = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_a = grad_b = None
        with exact_dtypes(g.device.type):
            # The two small products that read g come together, while it is in the cache.
            if need_b:
                grad_b = gradient_of_b(u, g, alpha, B.dtype)
            if need_x or need_a:
                du = pull_back(B, g, alpha)
                inputs = x.reshape(-1, x_shape[-1]) if need_a else None
                grad_x = g.mm(weight.to(g.dtype)) if need_x else None
                # The kept W + s B A has given the whole of grad_x already.
                grad_a = push_back(du, A.to(g.dtype), inputs, None if whole else grad_x, drop)
        if grad_x is not None:
            grad_x = grad_x.view(x_shape).to(x_dtype)
        if grad_a is not None:
            grad_a = grad_a.to(A.dtype)
        return grad_x, None, None, grad_a, grad_b, None, None, None
