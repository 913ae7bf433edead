"""Singular directions of a matrix from the Gram matrix of its shorter side.

An eigendecomposition of [q, q], q the shorter side, is several times faster than an SVD, and gives
spans and leading triplets as well. Squaring squares the condition number too: in float64 the
spectrum of a float32 matrix fits, but its smallest values lose their last digits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gram_directions(M: Tensor) -> tuple[Tensor, Tensor, bool]:
    """(All singular vectors of the shorter side of M [..., m, n], as rows [..., q, q]; singular
    values [..., q], descending; whether that side is the rows' m), in M's dtype.
    """
    flat = M.shape[-2] <= M.shape[-1]
    values, vectors = torch.linalg.eigh(M @ M.mT if flat else M.mT @ M)
    return vectors.flip(-1).mT, values.flip(-1).clamp_min(0).sqrt(), flat


def mapped_directions(M: Tensor, rows: Tensor, flat: bool) -> Tensor:
    """The other side's singular vectors [..., k, n] that belong to `rows` [..., k, q]."""
    # QR keeps them apart where M maps a direction to nothing.
    return torch.linalg.qr((M.mT if flat else M) @ rows.mT).Q.mT
