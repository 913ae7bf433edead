"""Three losses over a batch's logits: near a reference, spread out, and of few directions.

All take logits z [n, classes] (one row a sample, or a token with a label) and average over rows, in
float32 or wider; large vocabularies are worked through in blocks of rows that backward repeats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from plait.linalg.precision import accumulator_dtype, working_dtype

_BLOCK = 2**22  # logits whose probabilities exist at a time


def distance(z: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference of the rows of z and of the reference, each of length 1."""
    return (normalize(_wide(z), dim=-1) - normalize(_wide(reference), dim=-1)).square().mean()


def divergence(z: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(z)), averaged over rows."""

    def of_rows(z: Tensor, reference: Tensor) -> Tensor:
        log_p, log_q = _wide(reference).log_softmax(-1), _wide(z).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    return _over_blocks(of_rows, z, reference)


def covariance(z: Tensor) -> Tensor:
    """Squared covariances of different columns, summed, over the number of columns; 0 for one
    row, which has none."""
    centred = _wide(z) - _wide(z).mean(0)
    matrix = centred.mT @ centred / max(len(z) - 1, 1)
    return (matrix - matrix.diag().diag()).square().sum() / z.shape[-1]


def negative_entropy(z: Tensor) -> Tensor:
    """sum p log p of p = softmax(z), averaged over rows: least, -log classes, where p is even."""

    def of_rows(z: Tensor) -> Tensor:
        log_p = _wide(z).log_softmax(-1)
        return (log_p.exp() * log_p).sum()

    return _over_blocks(of_rows, z)


def concentration(z: Tensor, k: int, rows: int) -> Tensor:
    """Minus the share of the k largest singular values of z in the sum of all.

    Of at most `rows` rows, evenly spaced: the work grows with the cube of their number.
    """
    if len(z) > rows:
        z = z[torch.linspace(0, len(z) - 1, rows).round().long().to(z.device)]
    share: Tensor = _TopShare.apply(z, k)
    return -share


def _wide(z: Tensor) -> Tensor:
    return z.to(working_dtype(z.dtype))


def _over_blocks(of_rows: Callable[..., Tensor], *logits: Tensor) -> Tensor:
    """The sum of `of_rows` over blocks of rows, divided by the number of rows."""
    count = max(len(logits[0]), 1)
    size = max(1, _BLOCK // max(logits[0].shape[-1], 1))
    if len(logits[0]) <= size:
        return of_rows(*logits) / count
    blocks = zip(*(z.split(size) for z in logits), strict=True)
    sums = [
        checkpoint(of_rows, *block, use_reentrant=False, preserve_rng_state=False)
        for block in blocks
    ]
    return torch.stack(sums).sum() / count


class _TopShare(torch.autograd.Function):
    """sum of the k largest singular values of z over the sum of all.

    Through the eigenvectors U of the Gram matrix of z's shorter side, summed up in float64 over
    slices of the longer: d s_i = u_i^T dz v_i, so the gradient is U diag(w / s) U^T z, which is
    finite where singular values are equal. Those at rounding level count as 0 and get none.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, k: int) -> Tensor:
        flat = z if z.shape[0] <= z.shape[1] else z.mT
        wide = accumulator_dtype(z.device)
        gram = torch.zeros(len(flat), len(flat), dtype=wide, device=z.device)
        for part in flat.split(max(1, _BLOCK // max(len(flat), 1)), -1):
            part = part.to(wide)
            gram.addmm_(part, part.mT)
        # A step that overflows is left out by a loss scaler; eigh would end the run instead.
        one = torch.eye(len(gram), dtype=wide, device=z.device)
        gram = torch.where(gram.isfinite().all(), gram, one)
        squares, U = torch.linalg.eigh(gram)
        s = squares.clamp_min(0).sqrt()
        s = torch.where(s > s[-1] * (len(s) * torch.finfo(wide).eps) ** 0.5, s, 0.0)
        total = s.sum()
        share = torch.where(total > 0, s[-k:].sum() / total, 1.0)
        top = torch.zeros_like(s)
        top[-k:] = 1.0
        weights = torch.where(s > 0, (top - share) / (total * s), 0.0)
        ctx.save_for_backward(z, (U * weights) @ U.mT)
        return share.to(working_dtype(z.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        z, M = ctx.saved_tensors
        M = (M * grads[0]).to(z.dtype)
        return (M @ z if len(M) == z.shape[0] else z @ M), None
