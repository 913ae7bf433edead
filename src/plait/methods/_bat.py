"""Bat, the multiplicative form of Bone: dW_ij = W_ij D_i + D_i over the r x r blocks of W."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.adapter import Site
from plait.errors import PlaitError


def bat_shape(site: Site, r: int) -> tuple[int, int, int]:
    """The shape (out / r, r, r) of D; PlaitError where blocks of r x r do not tile W."""
    rows, columns = site.out_features, site.in_features
    if rows % r or columns % r:
        raise PlaitError(
            f"site {site.path!r} is [{rows}, {columns}], which blocks of {r} x {r} do not tile; "
            "choose a rank that divides both sides, or variant='miss'."
        )
    return rows // r, r, r


def bat_change(W: Tensor, D: Tensor) -> Tensor:
    """dW [out, in] for W [out, in] and D [out / r, r, r], one block of D for a row of blocks."""
    r = D.shape[-1]
    blocks = W.unflatten(0, (-1, r)).unflatten(2, (-1, r))
    change = torch.einsum("iajb,ibc->iajc", blocks, D) + D.unsqueeze(2)
    return change.reshape(W.shape)
