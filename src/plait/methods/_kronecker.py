"""Sums of Kronecker products acting on activations: what LoKr and SoKA share.

    D = scale * sum_k left_k kron right_k     left [K, m, n], right [K, p, q], D [m p, n q]

A token x is read as an n x q matrix X, and D x is scale * sum_k left_k X right_k^T: one product
with all of right at once, then one small product a token that sums over n and k together. D is
never formed. Backward keeps x alone and repeats the first product, whose result is K p / q times as
large as x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from plait.kernels._gate import compute_dtype, exact_dtypes, plain_path
from plait.linalg import kron_matvec


def kron_apply(x: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """D x [..., m p] for x [..., n q], in the dtype in which a linear layer would compute."""
    if plain_path(x, left, right):
        terms = [kron_matvec(x, a, b) for a, b in zip(left, right, strict=True)]
        return scale * torch.stack(terms).sum(0)
    return _KronApply.apply(None, x, left, right, scale, compute_dtype(x))


def kron_add(y: Tensor, x: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """y + D x, in y's dtype, for y [..., m p] and x [..., n q]."""
    if plain_path(y, x, left, right):
        return y + kron_apply(x, left, right, scale).to(y.dtype)
    return _KronApply.apply(y, x, left, right, scale, compute_dtype(x))


def kron_dense(left: Tensor, right: Tensor) -> Tensor:
    """sum_k left_k kron right_k [m p, n q], as one product of rank K."""
    blocks = left.flatten(1).t() @ right.flatten(1)
    return from_blocks(blocks, left.shape[1:], right.shape[1:])


def to_blocks(W: Tensor, m: int, n: int) -> Tensor:
    """The rearrangement R(W) [m n, p q] whose rows are W's m x n blocks.

    In it a Kronecker product has rank 1 (Van Loan, Pitsianis, 1993).
    """
    p, q = W.shape[0] // m, W.shape[1] // n
    return W.reshape(m, p, n, q).transpose(1, 2).reshape(m * n, p * q)


def from_blocks(blocks: Tensor, small: Sequence[int], large: Sequence[int]) -> Tensor:
    """The inverse of `to_blocks`, given (m, n) and (p, q): [m p, n q]."""
    (m, n), (p, q) = small, large
    return blocks.view(m, n, p, q).transpose(1, 2).reshape(m * p, n * q)


def _small(left: Tensor, dtype: torch.dtype) -> Tensor:
    """[m, n K]: left for a product that sums over n and k together."""
    return left.permute(1, 2, 0).reshape(left.shape[1], -1).to(dtype)


class _KronApply(Function):
    @staticmethod
    def forward(ctx: Any, y, x, left, right, scale, dtype):
        (_, m, n), (_, p, q) = left.shape, right.shape
        rows = x.to(dtype).reshape(-1, q)  # [T n, q]
        with exact_dtypes(x.device.type):
            Z = rows.mm(right.reshape(-1, q).to(dtype).t()).view(-1, n * left.shape[0], p)
            small = _small(left, dtype).expand(Z.shape[0], m, -1)
            if y is not None and y.dtype == dtype:
                out = torch.baddbmm(y.reshape(-1, m, p), small, Z, alpha=scale)
            else:
                out = small.bmm(Z).mul_(scale)
        ctx.save_for_backward(rows, left, right)
        ctx.settings = scale, dtype, x.shape, x.dtype
        out = out.view(*x.shape[:-1], m * p)
        return out if y is None or y.dtype == dtype else y + out.to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        rows, left, right = ctx.saved_tensors
        scale, dtype, x_shape, x_dtype = ctx.settings
        (K, m, n), (_, p, q) = left.shape, right.shape
        g = grad.to(dtype).reshape(-1, m, p)
        flat = right.reshape(-1, q).to(dtype)
        grad_x = grad_left = grad_right = None
        with exact_dtypes(g.device.type):
            if ctx.needs_input_grad[2]:
                Z = rows.mm(flat.t()).view(-1, n * K, p)
                summed = _contract(g, Z).mul_(scale).view(m, n, K)
                grad_left = summed.permute(2, 0, 1).to(left.dtype)
                del Z
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
                small = _small(left, dtype).mul(scale)
                dZ = small.t().expand(g.shape[0], -1, -1).bmm(g).view(-1, K * p)
                if ctx.needs_input_grad[1]:
                    grad_x = dZ.mm(flat).view(x_shape).to(x_dtype)
                if ctx.needs_input_grad[3]:
                    grad_right = dZ.t().mm(rows).view(K, p, q).to(right.dtype)
        return grad if ctx.needs_input_grad[0] else None, grad_x, grad_left, grad_right, None, None


def _contract(g: Tensor, Z: Tensor) -> Tensor:
    """sum_t g_t Z_t^T [m, j] for g [T, m, p] and Z [T, j, p], as one product."""
    return g.transpose(0, 1).flatten(1).mm(Z.transpose(0, 1).flatten(1).t())
