"""W's leading singular directions, from the Gram matrix of its shorter side.

Projectors need spans alone, so no full SVD: an eigendecomposition of [q, q], q the shorter side, is
several times faster, and the squared spectrum of a float32 matrix fits into float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leading_directions(W: Tensor) -> tuple[Tensor, Tensor, bool]:
    """(all singular vectors of W's shorter side as rows [q, q], singular values [q], descending;
    whether that side is the output's).
    """
    W = W.double()
    flat = W.shape[0] <= W.shape[1]
    values, vectors = torch.linalg.eigh(W @ W.mT if flat else W.mT @ W)
    return vectors.flip(1).mT, values.flip(0).clamp_min(0).sqrt(), flat


def mapped_directions(W: Tensor, rows: Tensor, flat: bool) -> Tensor:
    """The other side's singular vectors [k, n] that belong to `rows` [k, q]."""
    M = W.double().mT if flat else W.double()
    # QR keeps them apart where W maps a direction to nothing.
    return torch.linalg.qr(M @ rows.mT).Q.mT
