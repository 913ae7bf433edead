"""The part of a matrix in its smallest singular directions."""

from __future__ import annotations

import torch
from torch import Tensor


def smallest_part(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [out, rank], A [rank, in] in float64 with B A the sum of W's `rank` smallest triplets.

    Only the singular vectors of the shorter side are needed, W_cut = U U^T W or W V V^T, and they
    are eigenvectors of a Gram matrix: several times faster than an SVD. The squared spectrum of a
    float32 matrix fits into float64.
    """
    W = W.double()
    tall = W.shape[0] > W.shape[1]
    gram = W.T @ W if tall else W @ W.T
    vectors = torch.linalg.eigh(gram).eigenvectors[:, :rank]  # ascending
    return (W @ vectors, vectors.T) if tall else (vectors, vectors.T @ W)
