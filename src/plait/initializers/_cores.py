"""What initialisers of dW = s B R A ask of a delta, and a delta that waits for one."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.adapter import Delta
from plait.errors import PlaitError
from plait.methods.lora_xs import LoraXsDelta


class CoreDelta(LoraXsDelta):
    """LoRA-XS without its own start, for presets whose initialiser writes all three matrices."""

    def reset(self) -> None:
        """Nothing: the SVD that LoRA-XS takes of W would be overwritten."""


def require_core(delta: Delta, initializer: str) -> LoraXsDelta:
    """The delta, if a trained R [r, r] stands between its factors."""
    if not isinstance(delta, LoraXsDelta):
        raise PlaitError(
            f"initialiser {initializer!r} writes a matrix R between A and B, which "
            f"{type(delta).__name__} at {delta.site.path!r} does not have; use it with "
            "structured-lora or lora-xs."
        )
    return delta


def set_core(delta: LoraXsDelta, A: Tensor, R: Tensor, B: Tensor) -> None:
    """Write all three matrices of dW = s B R A."""
    delta.set_pair(A, B)
    with torch.no_grad():
        delta.R.copy_(R)
