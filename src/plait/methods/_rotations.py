"""Rotations in blocks: small orthogonal matrices from skew ones, multiplied into activations.

    q ──► Q = -Q^T [n, b, b] ──► R = (I + Q)(I - Q)^-1        x R: n blocks of b features each

R is always kept as its change C = R - I = 2 Q (I - Q)^-1, and x R computed as x + x C: half
precision would round the diagonal of R, 1 - |Q|^2, to 1. Nothing of W's size is ever formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from plait.kernels._gate import compute_dtype, exact_dtypes, plain_path

EFFICIENT = 32
"""Width up to which blocks are multiplied together: products of 32 columns take no longer than
of 4."""


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`, the smaller of two (PEFT's rule for blocks)."""
    found = [d for d in range(1, number + 1) if number % d == 0]
    return min(found, key=lambda d: (abs(d - wanted), d)) if wanted < number else number


def skew(q: Tensor, size: int) -> Tensor:
    """Q [..., b, b] with `q` [..., b (b - 1) / 2] above its diagonal, row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=q.device)
    upper = q.new_zeros(*q.shape[:-1], size, size)
    upper[..., rows, columns] = q
    return upper - upper.mT


def cayley(Q: Tensor, terms: int | None = None) -> Tensor:
    """R - I of skew matrices Q [..., b, b]: exact, or the sum to Q^(terms - 1) of its series.

    The series, 2 Q + 2 Q^2 + ... + 2 Q^(terms - 2) + Q^(terms - 1), makes of R the product
    (I - Q^(terms - 1)) R.
    """
    wide = Q.to(torch.promote_types(Q.dtype, torch.float32))  # there is no solver in half precision
    with exact_dtypes(Q.device.type):
        if terms is None:
            eye = torch.eye(Q.shape[-1], dtype=wide.dtype, device=Q.device)
            return torch.linalg.solve(eye - wide, 2 * wide).to(Q.dtype)
        total = wide
        for _ in range(terms - 2):
            total = wide @ total + 2 * wide
    return total.to(Q.dtype)


def butterfly(C: Tensor) -> Tensor:
    """R - I [n / 2^(m - 1), b 2^(m - 1), ..] of R = F_m .. F_1, from the factors' C [m, n, b, b].

    Factor i cuts 2^i half blocks in two halves, and turns together the k-th of either half.
    """
    factors, _, size, _ = C.shape
    width = size << (factors - 1)
    total: Tensor | None = None
    for i in reversed(range(factors)):
        factor = widened(C[i], width // size)
        if i:
            places = torch.arange(width, device=C.device).view(-1, 2, 1 << i, size // 2)
            back = places.transpose(1, 2).flatten().argsort()
            factor = factor.index_select(1, back).index_select(2, back)
        with exact_dtypes(C.device.type):
            total = factor if total is None else total + factor + total @ factor
    assert total is not None
    return total


def widened(C: Tensor, times: int) -> Tensor:
    """The same block-diagonal matrix in blocks `times` as wide, zero beside the old ones."""
    if times == 1:
        return C
    eye = torch.eye(times, dtype=C.dtype, device=C.device)
    blocks = C.unflatten(0, (-1, times)).unsqueeze(3) * eye[:, None, :, None]
    return blocks.reshape(len(blocks), times * C.shape[1], -1)


def blockwise(x: Tensor, C: Tensor) -> Tensor:
    """x C for x [..., n b] and block-diagonal C [n, b, b], or one block [1, b, b] for all."""
    return _multiply(x, C, add=False)


def rotate(x: Tensor, C: Tensor) -> Tensor:
    """x + x C, in one autograd node that keeps x and C."""
    return _multiply(x, C, add=True)


def _multiply(x: Tensor, C: Tensor, add: bool) -> Tensor:
    dtype = compute_dtype(x)
    if len(C) > 1:
        together = [k for k in range(1, EFFICIENT // C.shape[1] + 1) if len(C) % k == 0]
        C = widened(C, together[-1] if together else 1)
    if plain_path(x, C):
        product = (_cut(x.to(dtype), C).transpose(0, 1) @ C.to(dtype)).transpose(0, 1)
        product = product.reshape(x.shape)
        return x.to(dtype) + product if add else product
    return _Blocks.apply(x, C, add, dtype)


def _cut(x: Tensor, C: Tensor) -> Tensor:
    """x as [tokens, n, b]; with one shared block every slice of a token counts as a token."""
    return x.reshape(-1, C.shape[0], C.shape[1])


def _product(x: Tensor, C: Tensor, add: bool) -> Tensor:
    """[tokens, n, b] from x [tokens, n, b], written where it belongs and not copied there."""
    y = x.clone(memory_format=torch.contiguous_format) if add else torch.empty_like(x)
    y.transpose(0, 1).baddbmm_(x.transpose(0, 1), C, beta=1 if add else 0)
    return y


class _Blocks(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, C: Tensor, add: bool, dtype: torch.dtype) -> Tensor:
        inputs = _cut(x.to(dtype), C)
        need_x, need_c = ctx.needs_input_grad[:2]
        ctx.save_for_backward(inputs if need_c else None, C if need_x else None)
        ctx.settings = (add, x.shape, x.dtype, C.dtype)
        with exact_dtypes(x.device.type):
            return _product(inputs, C.to(dtype), add).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, C = ctx.saved_tensors
        add, shape, x_dtype, c_dtype = ctx.settings
        grad_x = grad_c = None
        with exact_dtypes(grad.device.type):
            if C is not None:
                g = _cut(grad, C)
                grad_x = _product(g, C.mT.to(grad.dtype), add).view(shape).to(x_dtype)
            if x is not None:
                g = grad.reshape(x.shape).transpose(0, 1)
                grad_c = (x.permute(1, 2, 0) @ g).to(c_dtype)
        return grad_x, grad_c, None, None
