"""Block-wise quantisation to a code book, in plain PyTorch: NF4 and its kin, uniform levels, and
the 8-bit books of optimiser states.

    W ──► blocks of `block` weights ──► / max |block| ──► nearest code ──► * max |block|

Blocks run along the flattened weight, as bitsandbytes lays them out; a last one may be shorter.
The scale of a block is one float32 number. "normal" is QLoRA's NormalFloat: codes at quantiles of
N(0, 1), so that each is used equally often by normally distributed weights, with an exact zero
(Dettmers et al., 2023, arXiv 2305.14314); "uniform" has equal steps from -1 to 1; "dynamic", and
"dynamic-unsigned" for what is never negative, span seven decades (see `dynamic.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.quantization.dynamic import dynamic_codes


@dataclass(frozen=True)
class BlockQuantizer:
    width: int = 4
    """Bits of a code: 2 to 8."""
    block: int = 64
    """Weights that share a scale."""
    codes: Literal["normal", "uniform", "dynamic", "dynamic-unsigned"] = "normal"
    """The code book."""

    def __post_init__(self) -> None:
        check_choices(self, "quantiser")
        if not 2 <= self.width <= 8 or self.block < 1:
            raise PlaitError(
                f"quantiser: width is 2 to 8 and block at least 1, not {self.width} and "
                f"{self.block}."
            )
        if self.codes.startswith("dynamic") and self.width != 8:
            raise PlaitError(f"quantiser: codes {self.codes!r} have width 8, not {self.width}.")

    @property
    def bits(self) -> float:
        """Bits a weight, with a float32 scale a block."""
        return self.width + 32 / self.block

    def book(self, like: Tensor) -> Tensor:
        """The codes, ascending, in `like`'s dtype and device."""
        return _book(self.codes, self.width, like.dtype, like.device)

    def quantize(self, weight: Tensor) -> Tensor:
        """`weight` with every entry at a code of its block; a block of zeros stays one."""
        return self.decode(*self.encode(weight)).to(weight.dtype)

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, uint8 of `weight`'s shape; a scale a block, [blocks], float32 at least)."""
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        flat = wide.flatten()
        blocks = F.pad(flat, (0, -len(flat) % self.block)).unflatten(0, (-1, self.block))
        scale = blocks.abs().amax(1, keepdim=True)
        book = self.book(wide)
        unit = blocks / torch.where(scale > 0, scale, 1)
        nearest = _bucket(unit, (book[1:] + book[:-1]) / 2)
        return nearest.flatten()[: len(flat)].reshape(weight.shape), scale.flatten()

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """What was encoded, in `scale`'s dtype."""
        unit = self.book(scale).index_select(0, codes.flatten().int())
        padded = F.pad(unit, (0, -len(unit) % self.block)).unflatten(0, (-1, self.block))
        return (padded * scale.unsqueeze(1)).flatten()[: len(unit)].reshape(codes.shape)


@cache
def _book(codes: str, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Kept, since copying a list to a GPU waits for it.
    if codes.startswith("dynamic"):
        values = dynamic_codes(signed=codes == "dynamic")
    else:
        values = (normal_codes if codes == "normal" else uniform_codes)(width)
    return torch.tensor(values, dtype=dtype, device=device)


def _bucket(values: Tensor, edges: Tensor) -> Tensor:
    """How many of `edges`, ascending, lie below each value, uint8."""
    if len(edges) > 15:
        return torch.bucketize(values, edges, out_int32=True).to(torch.uint8)
    # A search branches at random for every entry; a few whole comparisons are three times faster.
    count = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for edge in edges:
        count += values > edge
    return count


@cache
def normal_codes(width: int) -> tuple[float, ...]:
    """NormalFloat's 2^width codes: 2^(width-1) quantiles above zero, zero, and one fewer below.

    The outermost quantile is the mean of those that 15 and 16 equal shares a side would give, in
    every width, as in the authors' code.
    """
    edge = 1 - (1 / 30 + 1 / 32) / 2
    above, below = 2 ** (width - 1), 2 ** (width - 1) - 1
    levels = [*_quantiles(edge, above), 0.0, *(-q for q in _quantiles(edge, below))]
    greatest = max(levels)
    return tuple(sorted(level / greatest for level in levels))


def _quantiles(edge: float, count: int) -> list[float]:
    shares = torch.linspace(edge, 0.5, count + 1, dtype=torch.float64)[:-1]
    return torch.special.ndtri(shares).tolist()


@cache
def uniform_codes(width: int) -> tuple[float, ...]:
    """2^width equal steps from -1 to 1."""
    return tuple(torch.linspace(-1, 1, 2**width, dtype=torch.float64).tolist())
