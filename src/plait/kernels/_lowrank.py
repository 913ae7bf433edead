"""The low-rank products that every fused kernel is made of, with or without dropout.

With dropout they walk over blocks of rows that fit the cache and draw each block's mask on the
way, so that neither a mask nor a dropped copy of x of full size ever exists. The 1/keep of inverted
dropout is not applied here: callers fold it, with the scale, into the [T, r] side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.kernels.dropout import Dropout, row_blocks


def gain(scale: float, drop: Dropout | None) -> float:
    """The factor on the [T, r] side: the adapter's scale and inverted dropout's 1/keep."""
    return scale if drop is None else scale / drop.keep


def project(x: Tensor, A: Tensor, drop: Dropout | None) -> Tensor:
    """(mask * x) A^T, [T, r], of x [T, in] and A [r, in] in one dtype."""
    if drop is None:
        return x.mm(A.t())
    stream = drop.stream(x.device)
    u = x.new_empty(x.shape[0], A.shape[0])
    for start, stop in row_blocks(*x.shape):
        block = x[start:stop]
        torch.mm(block * stream.next(*block.shape), A.t(), out=u[start:stop])
    return u


def push_back(
    du: Tensor, A: Tensor, x: Tensor | None, grad_x: Tensor | None, drop: Dropout | None
) -> Tensor | None:
    """The backward of `project`: adds mask * (du A) to grad_x in place and returns dA.

    Args:
        du: [T, r], the gradient of u.
        A: [r, in] in du's dtype.
        x: [T, in] in du's dtype, or None where dA is not wanted.
        grad_x: [T, in] to accumulate into, or None where the gradient in x is not wanted.

    Returns:
        dA = du^T (mask * x), [r, in], or None.
    """
    if drop is None:
        if grad_x is not None:
            grad_x.addmm_(du, A)
        return None if x is None else du.t().mm(x)
    stream = drop.stream(du.device)
    rows, columns = du.shape[0], A.shape[1]
    wide = torch.promote_types(du.dtype, torch.float32)  # blocks are summed in fp32 at least
    grad_a = None if x is None else torch.zeros_like(A, dtype=wide)
    for start, stop in row_blocks(rows, columns):
        mask = stream.next(stop - start, columns)
        part = du[start:stop]
        if grad_x is not None:
            grad_x[start:stop].add_(part.mm(A).mul_(mask))
        if x is not None and grad_a is not None:
            masked = x[start:stop] * mask
            if wide == du.dtype:
                grad_a.addmm_(part.t(), masked)
            else:
                grad_a.add_(part.t().mm(masked))
    return grad_a
