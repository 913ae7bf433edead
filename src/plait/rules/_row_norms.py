"""Norms of the rows of a product of two factors, without the product."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.adapter import Pair
from plait.linalg.precision import working_dtype


def row_norms(B: Tensor, A: Tensor) -> Tensor:
    """||row_i(B A)|| [..., out] of B [..., out, r], A [..., r, in]: the root of b_i (A A^T) b_i^T.

    It squares before it adds, so where rows of B A cancel only half the digits are left.
    """
    wide = working_dtype(B.dtype, A.dtype)
    B, A = B.to(wide), A.to(wide)
    return ((B @ (A @ A.mT)) * B).sum(-1).clamp_min(0).sqrt()


def change_norms(pair: Pair) -> Tensor:
    """Row norms [..., out] of what a pair changes: scale * B A, less what its start holds back."""
    B, A = pair.B.detach(), pair.A.detach()
    held = dict(pair.delta.named_buffers())
    if "held_A" in held:
        B, A = torch.cat([B, -held["held_B"]], -1), torch.cat([A, held["held_A"]], -2)
    return pair.scale * row_norms(B, A)


def gradient_norms(pair: Pair) -> Tensor:
    """Row norms [..., out] of scale * (B g_A + g_B A), where a step along the gradients leads."""
    B, A = pair.B.detach(), pair.A.detach()
    g_A = torch.zeros_like(A) if pair.A.grad is None else pair.A.grad
    g_B = torch.zeros_like(B) if pair.B.grad is None else pair.B.grad
    return pair.scale * row_norms(torch.cat([B, g_B], -1), torch.cat([g_A, A], -2))
