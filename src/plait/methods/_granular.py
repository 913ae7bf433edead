"""GraLoRA's two block-diagonal products with the exchange between them, as one autograd node.

    (x_1 .. x_k) ──► u_n = x_n A_n ──► v_j = (piece j of every u_n) ──► y_j + s v_j B_j

A [k, in/k, r], B [k, r, out/k]; a piece has r / k numbers. The work is that of LoRA at rank r; x
and v, k r numbers a token, are kept for backward. As in LoRA's kernels u and v are held transposed,
[r, tokens], and the k blocks, few and wide, are taken one after the other as slices of x and y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from plait.kernels._gate import compute_dtype, exact_dtypes, plain_path


def granular_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y [..., out] + scale * the change for x [..., in], in y's dtype."""
    if plain_path(y, x, A, B):
        return y + (scale * _change(x, A, B)).to(y.dtype)
    return _Granular.apply(y, x, A, B, None, None, scale, compute_dtype(x))


def granular_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """x W^T + b + scale * the change, in one node: nothing is added to a tensor of x's or y's size
    in a pass of its own. W [out, in] and b are frozen for that."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained or plain_path(x, weight, A, B):
        y = F.linear(x, weight, bias)
        return y + (scale * _change(x, A, B)).to(y.dtype)
    return _Granular.apply(None, x, A, B, weight, bias, scale, compute_dtype(x, weight))


def _change(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    k, size, r = A.shape
    u = torch.einsum("...ni,nir->...nr", x.unflatten(-1, (k, size)), A.to(x.dtype))
    v = u.unflatten(-1, (k, r // k)).transpose(-3, -2).flatten(-2)
    return torch.einsum("...jr,jro->...jo", v, B.to(x.dtype)).flatten(-2)


def _exchange(u: Tensor) -> Tensor:
    """[k, r, T] to [k, r, T]: piece j of block n becomes piece n of block j; its own inverse."""
    k, r, tokens = u.shape
    return u.view(k, k, r // k, tokens).transpose(0, 1).reshape(k, r, tokens)


class _Granular(Function):
    @staticmethod
    def forward(ctx: Any, y, x, A, B, weight, bias, scale, dtype):
        k, size, r = A.shape
        rows = x.to(dtype).reshape(-1, k * size)
        u = rows.new_empty(k, r, len(rows))
        with exact_dtypes(x.device.type):
            if y is None:
                b = None if bias is None else bias.to(dtype)
                out = F.linear(x.to(dtype), weight.to(dtype), b)
            else:
                out = y.to(dtype, copy=True, memory_format=torch.contiguous_format)
            flat = out.view(-1, out.shape[-1])
            for n, (a, part) in enumerate(zip(A.to(dtype), rows.chunk(k, 1), strict=True)):
                torch.mm(a.t(), part.t(), out=u[n])
            v = _exchange(u)
            for j, (b, part) in enumerate(zip(B.to(dtype), flat.chunk(k, 1), strict=True)):
                part.addmm_(v[j].t(), b, alpha=scale)
        ctx.save_for_backward(rows, v, A, B, weight)
        ctx.settings = scale, dtype, x.shape, x.dtype
        return out if y is None else out.to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        rows, v, A, B, weight = ctx.saved_tensors
        scale, dtype, x_shape, x_dtype = ctx.settings
        k = len(A)
        g = grad.to(dtype).reshape(-1, grad.shape[-1])
        dv, grad_B, grad_A = torch.empty_like(v), torch.empty_like(B), torch.empty_like(A)
        with exact_dtypes(g.device.type):
            for j, (b, part) in enumerate(zip(B.to(dtype), g.chunk(k, 1), strict=True)):
                dv[j].addmm_(b, part.t(), beta=0, alpha=scale)
                grad_B[j] = v[j].mm(part).mul_(scale)
            du = _exchange(dv)
            grad_x = rows.new_zeros(rows.shape) if weight is None else g.mm(weight.to(dtype))
            for n, (a, part) in enumerate(zip(A.to(dtype), rows.chunk(k, 1), strict=True)):
                grad_A[n] = du[n].mm(part).t()
                grad_x.chunk(k, 1)[n].addmm_(du[n].t(), a.t())
        grad_y = grad if weight is None else None
        return grad_y, grad_x.view(x_shape).to(x_dtype), grad_A, grad_B, None, None, None, None
