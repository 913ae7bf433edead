"""Masks of what is kept of a change, one bit for every entry or unit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plait.errors import PlaitError


def pack(mask: Tensor) -> Tensor:
    """A bool mask of any shape as bytes [ceil(n / 8)], eight entries each, the first highest."""
    flat = mask.to("cpu", torch.bool).flatten()
    padded = torch.zeros(-(-len(flat) // 8), 8, dtype=torch.uint8)
    padded.view(-1)[: len(flat)] = flat
    return (padded << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(mask: Tensor, shape: tuple[int, ...], path: str) -> Tensor:
    """The bool mask of that shape; `path` is the site that an error names.

    Takes what `pack` made, or a bool tensor that has the shape already.
    """
    count = math.prod(shape)
    if mask.dtype == torch.bool and tuple(mask.shape) == shape:
        return mask
    if mask.dtype != torch.uint8 or mask.shape != (-(-count // 8),):
        raise PlaitError(
            f"site {path!r}: a mask is {mask.dtype} {list(mask.shape)}, but one for {list(shape)} "
            "is needed; localize the same adapter, in the units that its space merges."
        )
    bits = mask[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1
    return bits.flatten()[:count].bool().view(shape)
