"""BOFT: an orthogonal matrix as a product of sparse ones, wired like a butterfly.

    x ──► F_m ──► .. ──► F_2 ──► F_1 ──► W ──► * s ──► + bias

y = s * (x R) W^T, so W' = diag(s) W R^T, with R = F_m .. F_1. F_1 rotates blocks of b features, F_i
blocks of two halves that lie b 2^(i - 2) features apart: R mixes b 2^(m - 1) features, for which
one block of OFT would need 2^(m - 1) / m times the numbers or more. Rotations are Cayley's, of skew
matrices that start at 0; s [out] starts at 1. The factors are multiplied out to R's blocks first,
at 2 in (m - 1) (b 2^(m - 1))^2 operations whatever the batch; then inputs are rotated as by OFT.
Two active adapters add their changes; a product of rotations is their fusion one after the other.
Paper: Liu et al., 2023, arXiv 2311.06243. Parameters: m in (b - 1) / 2 + out a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Delta, Method, Options, Site, Traits, first_input, per_site
from plait.errors import PlaitError
from plait.methods._boft_peft import BOFT
from plait.methods._rescale import rescale
from plait.methods._rotations import blockwise, butterfly, cayley, nearest_divisor, rotate, skew


@dataclass(frozen=True)
class BoftOptions(Options):
    block_size: int = 4
    """Features b in a block; where b does not divide a site's inputs, the nearest divisor."""
    factors: int = 1
    """How many butterfly factors m (paper: 1 to 6), or the most for which b 2^(m - 1) divides a
    site's inputs and b is even; 1 is OFT of that block size, with a scale."""
    block_dropout: float = 0.0
    """Probability of leaving a block as it is in a training step."""

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.factors < 1:
            raise PlaitError("boft: block_size must be at least 2 and factors at least 1.")
        if not 0 <= self.block_dropout < 1:
            raise PlaitError(f"block_dropout must lie in [0, 1), not {self.block_dropout}.")

    def shape(self, site: Site) -> tuple[int, int, int]:
        """(factors, blocks of each, features of a block) at a site."""
        size, inputs = nearest_divisor(site.in_features, self.block_size), site.in_features
        if size < 2:
            raise PlaitError(
                f"no divisor of the {inputs} inputs of {site.path!r} is near block_size="
                f"{self.block_size}; set another there with overrides=."
            )
        most = 1 if size % 2 else self.factors
        fits = [m for m in range(1, most + 1) if inputs % (size << (m - 1)) == 0]
        return fits[-1], inputs // size, size


class BoftDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(depends_on_base=True)
    options: BoftOptions
    q: Tensor
    s: Tensor

    def build(self) -> None:
        factors, blocks, self.size = self.options.shape(self.site)
        self.parameter("q", factors, blocks, self.size * (self.size - 1) // 2)
        self.parameter("s", self.site.out_features)

    def reset(self) -> None:
        torch.nn.init.ones_(self.s)

    def change(self) -> Tensor:
        """R - I in blocks of b 2^(m - 1)."""
        C = cayley(skew(self.q, self.size))
        if self.training and self.options.block_dropout:
            kept = torch.rand(*C.shape[:2], 1, 1, device=C.device) >= self.options.block_dropout
            C = C * kept
        return butterfly(C)

    def dense(self) -> Tensor:
        W, stretch = self.base_weight(), (self.s - 1)[:, None]
        change = blockwise(W, self.change().mT)
        return change + stretch * (W + change)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.site.kind == "conv":
            return super().forward(x)
        weight = self.site.weight()
        change = self.site.apply(blockwise(x, self.change()), weight)
        return change + (self.s - 1).to(change.dtype) * (self.site.apply(x, weight) + change)

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        if self.site.kind == "conv":
            return super().adapt(*args, **kwargs)
        x = first_input(args, kwargs)
        stretch, bias = self.s - 1, self.site.bias()
        y = rescale(self.site.forward(rotate(x, self.change())), stretch)
        return y if bias is None else y - (stretch * bias).to(y.dtype)


def _count(site: Site, o: BoftOptions) -> int:
    factors, blocks, size = o.shape(site)
    return factors * blocks * size * (size - 1) // 2 + site.out_features


METHOD = Method(
    name="boft",
    title="BOFT: orthogonal butterfly finetuning",
    paper="Liu et al., 2023, arXiv 2311.06243",
    axis="parameterisation",
    options=BoftOptions,
    delta=BoftDelta,
    count=per_site(_count),
    peft=BOFT,
    example={"block_size": 2, "factors": 2},
)
