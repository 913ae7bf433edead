"""What initialisers that write an (A, B) pair ask of a delta."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.adapter import Delta, PairDelta
from plait.errors import PlaitError


def require_pair(delta: Delta, initializer: str) -> PairDelta:
    """The delta, if it has a trainable pair of matrices A [..., r, in], B [..., out, r]."""
    if not isinstance(delta, PairDelta) or not delta.pairs():
        raise PlaitError(
            f"initialiser {initializer!r} writes an (A, B) pair, which {type(delta).__name__} at "
            f"{delta.site.path!r} does not train; use it with lora or another method of pairs."
        )
    return delta


def set_leading(pair: PairDelta, A: Tensor, B: Tensor) -> None:
    """Write A [..., k, in] and B [..., out, k] into a pair of rank r >= k; the rest is zero.

    A rank above the site's shorter side has fewer directions to start at than components.
    """
    full_A, full_B = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
    full_A[..., : A.shape[-2], :] = A
    full_B[..., : B.shape[-1]] = B
    pair.set_pair(full_A, full_B)
