"""LoRA's additive part for a base that is a black box: y + scale * (drop(x) A^T) B^T.

For quantised, tensor-parallel or otherwise opaque bases, whose product and input gradient are their
own. One autograd node that keeps x and x A^T, and writes into y where nobody can notice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from plait.kernels import dispatch, reference
from plait.kernels._gate import compute_dtype, exact_dtypes, plain_path
from plait.kernels._lowrank import gain, gradient_of_b, project, pull_back, push_back
from plait.kernels.dropout import Dropout, make_dropout


def lora_add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    *,
    dropout: float = 0.0,
    seed: int | None = None,
    inplace: bool | None = None,
) -> Tensor:
    """y + scale * (drop(x) A^T) B^T as one autograd node, in y's dtype.

    Args:
        y: [..., out], what the base made of x.
        x: [..., in], the base's input.
        A: [r, in] and B: [out, r], in any floating dtype.
        scale: the factor on the low-rank part.
        dropout: probability with which an entry of x is dropped for A, in [0, 1).
        seed: of the dropout mask; None draws one from PyTorch's CPU generator.
        inplace: True writes into y and returns it, and is the caller's word that y is a fresh
            temporary. None does so where autograd shows that y is one (see `_is_fresh`). False
            never does.
    """
    if plain_path(y, x, A, B):
        return reference.lora_add(y, x, A, B, scale, dropout=dropout, seed=seed)
    if A.shape[0] == 0:
        return y
    drop = make_dropout(dropout, seed)
    dtype = compute_dtype(x)
    if inplace is None:
        inplace = _is_fresh(y, x)
    inplace = inplace and y.dtype == dtype and y.is_contiguous()
    run = dispatch.find("lora_add", x.device.type)
    if run is not None:
        return run(y, x, A, B, scale, drop, inplace)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, A, B)):
        return _LoraAdd.apply(y, x, A, B, scale, drop, dtype, inplace)
    with exact_dtypes(x.device.type):
        return _add(y, x.to(dtype), A, B, scale, drop, inplace)[0]


def _is_fresh(y: Tensor, x: Tensor) -> bool:
    """Whether y is a temporary that only its producer has seen.

    That is: made by an autograd node that did not keep it for its own backward, no view, and not x
    in disguise (an identity base). A y without history may be anyone's, so it is left alone.
    """
    node = y.grad_fn
    if node is None or y._base is not None or y.data_ptr() == x.data_ptr():
        return False
    if hasattr(node, "_saved_result"):  # built-in nodes that keep their output: relu, sigmoid, ...
        return False
    saved = getattr(node, "saved_tensors", ())  # Functions written in Python
    return all(t is None or t.data_ptr() != y.data_ptr() for t in saved)


def _add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, drop: Dropout | None, inplace: bool
) -> tuple[Tensor, Tensor]:
    """(y + the low-rank part, u), with x in the compute dtype."""
    dtype = x.dtype
    u = project(x.reshape(-1, x.shape[-1]), A.to(dtype), drop)
    b, alpha = B.to(dtype), gain(scale, drop)
    if inplace:
        y.view(-1, y.shape[-1]).addmm_(u.t(), b.t(), alpha=alpha)
        return y, u
    if y.dtype == dtype:
        flat = torch.addmm(y.reshape(-1, y.shape[-1]), u.t(), b.t(), alpha=alpha)
        return flat.view(y.shape), u
    return y.add(u.t().mm(b.t()).view(y.shape).to(y.dtype), alpha=alpha), u


class _LoraAdd(Function):
    @staticmethod
    def forward(ctx: Any, y, x, A, B, scale, drop, dtype, inplace):
        inputs = x.to(dtype)
        if inplace:
            ctx.mark_dirty(y)
        with exact_dtypes(x.device.type):
            y, u = _add(y, inputs, A, B, scale, drop, inplace)
        need_a, need_b = ctx.needs_input_grad[2:4]
        ctx.save_for_backward(inputs if need_a else None, u if need_b else None, A, B)
        ctx.settings = (gain(scale, drop), drop, dtype, x.shape, x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        need_y, need_x, need_a, need_b = ctx.needs_input_grad[:4]
        x, u, A, B = ctx.saved_tensors
        alpha, drop, dtype, x_shape, x_dtype = ctx.settings
        g = grad.reshape(-1, grad.shape[-1]).to(dtype)
        grad_x = grad_a = grad_b = None
        with exact_dtypes(g.device.type):
            if need_b:
                grad_b = gradient_of_b(u, g, alpha, B.dtype)
            if need_x:
                grad_x = g.new_zeros(g.shape[0], x_shape[-1])
            if need_x or need_a:
                du = pull_back(B, g, alpha)
                inputs = x.reshape(-1, x_shape[-1]) if need_a else None
                grad_a = push_back(du, A.to(dtype), inputs, grad_x, drop)
        if grad_x is not None:
            grad_x = grad_x.view(x_shape).to(x_dtype)
        if grad_a is not None:
            grad_a = grad_a.to(A.dtype)
        return grad if need_y else None, grad_x, grad_a, grad_b, None, None, None, None
