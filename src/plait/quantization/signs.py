"""One bit a weight: its sign, times the mean size of its block.

    W ──► blocks of `block` weights ──► sign * mean |block|

The mean of the magnitudes is the scale of least squared error for the signs. Zero counts as
positive. (The largest magnitude, which `BlockQuantizer` scales by, would be far too great here.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.errors import PlaitError


@dataclass(frozen=True)
class SignQuantizer:
    block: int = 64
    """Weights that share a scale."""

    width = 1

    def __post_init__(self) -> None:
        if self.block < 1:
            raise PlaitError(f"quantiser: block is at least 1, not {self.block}.")

    @property
    def bits(self) -> float:
        """Bits a weight, with a float32 scale a block."""
        return 1 + 32 / self.block

    def book(self, like: Tensor) -> Tensor:
        """The codes' values, in `like`'s dtype and device."""
        return torch.tensor([-1.0, 1.0], dtype=like.dtype, device=like.device)

    def quantize(self, weight: Tensor) -> Tensor:
        """`weight` as it reads back."""
        return self.decode(*self.encode(weight)).to(weight.dtype)

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(codes 0 or 1, uint8 of `weight`'s shape; a scale a block, float32 at least)."""
        flat = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).flatten()
        tail = -len(flat) % self.block
        sums = F.pad(flat.abs(), (0, tail)).unflatten(0, (-1, self.block)).sum(1)
        counts = sums.new_full(sums.shape, self.block)
        counts[-1:] -= tail
        return (weight >= 0).to(torch.uint8), sums / counts

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """What was encoded, in `scale`'s dtype."""
        unit = self.book(scale).index_select(0, codes.flatten().int())
        padded = F.pad(unit, (0, -len(unit) % self.block)).unflatten(0, (-1, self.block))
        return (padded * scale.unsqueeze(1)).flatten()[: len(unit)].reshape(codes.shape)
