"""Every kernel of this room in plain, out-of-place PyTorch: the oracle and the fallback.

    y = x W^T + b + scale * (drop(x) A^T) B^T

Shapes: x [..., in], weight [out, in], bias [out] or None, A [r, in], B [out, r], scale a float.
These functions compile, transform and differentiate any number of times; the fused ones agree with
them to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from plait.kernels._gate import compute_dtype
from plait.kernels.dropout import dropout_mask, keep_probability


def dropped(x: Tensor, p: float, seed: int | None) -> Tensor:
    """Inverted dropout of x: of `seed`'s own mask, or of PyTorch's generator without one."""
    if p == 0.0:
        return x
    if seed is None:
        return F.dropout(x, p)
    mask = dropout_mask(tuple(x.shape), p, seed, x.device)
    return x * mask.to(x.dtype) / keep_probability(p)


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """scale * (x A^T) B^T in the dtype in which `F.linear` would multiply x."""
    dtype = compute_dtype(x)
    u = F.linear(x.to(dtype), A.to(dtype)) * scale
    return F.linear(u, B.to(dtype))


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
    """x W^T + b + scale * (drop(x) A^T) B^T, [..., out]."""
    y = F.linear(x, weight, bias)
    if A.shape[0] == 0:
        return y
    return y + low_rank(dropped(x, dropout, seed), A, B, scale)


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor | None],
    Bs: Sequence[Tensor | None],
    scales: Sequence[float],
    *,
    dropout: float = 0.0,
    seed: int | None = None,
) -> tuple[Tensor, ...]:
    """Several LoRA linears of one x, under one dropout mask; a member without factors is bare."""
    inputs = dropped(x, dropout, seed)
    outputs = []
    for weight, bias, A, B, scale in zip(weights, biases, As, Bs, scales, strict=True):
        y = F.linear(x, weight, bias)
        if A is not None and B is not None and A.shape[0]:
            y = y + low_rank(inputs, A, B, scale)
        outputs.append(y)
    return tuple(outputs)


def lora_add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    *,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """y + scale * (drop(x) A^T) B^T in y's dtype, for a base that computed y by its own means."""
    if A.shape[0] == 0:
        return y
    return y + low_rank(dropped(x, dropout, seed), A, B, scale).to(y.dtype)


def multi_lora(
    y: Tensor,
    x: Tensor,
    ids: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
) -> Tensor:
    """y with each row's own adapter added, [T, out]: row t takes adapter ids[t], -1 takes none."""
    for index, (A, B, scale) in enumerate(zip(As, Bs, scales, strict=True)):
        mine = (ids == index).to(y.dtype).unsqueeze(-1)
        y = y + mine * low_rank(x, A, B, scale).to(y.dtype)
    return y
