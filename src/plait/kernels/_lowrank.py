"""The low-rank products that every fused kernel is made of, with or without dropout.

Everything of rank r is kept transposed, [r, T]. As products, A x^T, B^T g^T and u^T g then run at
60 to 85 % of the base product's speed on a CPU at r = 8, where x A^T takes 1.7 times and g B 4.3
times as long (the same in exact arithmetic, and no difference from r = 64 on).

With dropout they walk over blocks of rows that fit the cache and draw each block's mask on the
way, so that neither a mask nor a dropped copy of x of full size ever exists. The 1/keep of inverted
dropout is not applied to the blocks: it rides, with the adapter's scale, on the products' `alpha`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plait.kernels.dropout import Dropout, row_blocks


def gain(scale: float, drop: Dropout | None) -> float:
    """The factor on the low-rank part: the adapter's scale and inverted dropout's 1/keep."""
    return scale if drop is None else scale / drop.keep


# From this rank on the products with A and B are bound by arithmetic, not by memory.
FOLD_RANK = 32


def fold_plan(
    x: Tensor, weights: Sequence[Tensor], As: Sequence[Tensor | None], drop: Dropout | None
) -> tuple[bool, bool]:
    """(run x (W + s B A)^T as one product?, keep that sum for backward too?), for linears of one x.

    Summing costs out * in * r a weight where the separate products cost tokens * out * r, and
    tokens * in * r more in backward if the sum is kept, which is done while it is no larger than
    the x that is kept anyway. On CPUs, without dropout, in the weights' own float32 or float64
    alone: in half precision the sum would round dW away.
    """
    if drop is not None or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False, False
    if any(A is None or A.shape[0] < FOLD_RANK for A in As):
        return False, False
    if any(weight.dtype != x.dtype for weight in weights):
        return False, False
    tokens, width = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    keep = all(weight.shape[0] <= tokens for weight in weights)
    pays = all(w.numel() < tokens * (w.shape[0] + (width if keep else 0)) for w in weights)
    return pays, pays and keep


def project(x: Tensor, A: Tensor, drop: Dropout | None) -> Tensor:
    """A (mask * x)^T, [r, T], of x [T, in] and A [r, in] in one dtype."""
    if drop is None:
        return A.mm(x.t())
    stream = drop.stream(x.device)
    u = x.new_empty(A.shape[0], x.shape[0])
    for start, stop in row_blocks(*x.shape):
        block = x[start:stop]
        masked = block * stream.next(*block.shape)
        torch.mm(A, masked.t(), out=u[:, start:stop])
    return u


def pull_back(B: Tensor, g: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    """alpha * B^T g^T, [r, T]: the gradient of u for the output gradient g [T, out]."""
    if out is None:
        out = g.new_empty(B.shape[1], g.shape[0])
    return out.addmm_(B.to(g.dtype).t(), g.t(), beta=0, alpha=alpha)


def gradient_of_b(u: Tensor, g: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """alpha * g^T u^T, [out, r], taken as (u g)^T: the direct way is up to five times slower."""
    return u.mm(g).to(dtype).mul_(alpha).t()


def push_back(
    du: Tensor, A: Tensor, x: Tensor | None, grad_x: Tensor | None, drop: Dropout | None
) -> Tensor | None:
    """The backward of `project`: adds mask * (du^T A) to grad_x in place and returns dA.

    Args:
        du: [r, T], the gradient of u.
        A: [r, in] in du's dtype.
        x: [T, in] in du's dtype, or None where dA is not wanted.
        grad_x: [T, in] to accumulate into, or None where the gradient in x is not wanted.

    Returns:
        dA = du (mask * x), [r, in], or None.
    """
    if drop is None:
        if grad_x is not None:
            grad_x.addmm_(du.t(), A)
        return None if x is None else du.mm(x)
    stream = drop.stream(du.device)
    columns = A.shape[1]
    wide = torch.promote_types(du.dtype, torch.float32)  # blocks are summed in fp32 at least
    grad_a = None if x is None else torch.zeros_like(A, dtype=wide)
    for start, stop in row_blocks(du.shape[1], columns):
        mask = stream.next(stop - start, columns)
        part = du[:, start:stop]
        if grad_x is not None:
            grad_x[start:stop].add_(part.t().mm(A).mul_(mask))
        if x is not None and grad_a is not None:
            masked = x[start:stop] * mask
            if wide == du.dtype:
                grad_a.addmm_(part, masked)
            else:
                grad_a.add_(part.mm(masked))
    return grad_a
