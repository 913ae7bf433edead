"""OFT: orthogonal finetuning, W turned by small rotations and never stretched.

    x ──► cut into n blocks of b features ──► block i times R_i ──► W, b ──► y

y = (x R) W^T, so W' = W R^T, with R = blockdiag(R_1 .. R_n) and every R_i orthogonal by Cayley's
transform R = (I + Q)(I - Q)^-1 of a skew Q, which has b (b - 1) / 2 free numbers and starts at 0.
Angles between the rows of W, their lengths and W's singular values stay what they are. Inputs are
rotated, not weights (OFT v2, arXiv 2506.19847): 6 b operations a feature and token beside the
linear's own, and W may be quantised. By default R is a series of five terms, which is off by a
factor I - Q^4.
Two active adapters add their changes; a product of rotations is their fusion one after the other.
Paper: Qiu et al., 2023, arXiv 2306.07280. Parameters: in (b - 1) / 2 a site, or b (b - 1) / 2
with one block for all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Delta, Method, Options, Site, Traits, first_input, per_site
from plait.errors import PlaitError
from plait.methods._oft_peft import OFT
from plait.methods._rotations import blockwise, cayley, nearest_divisor, rotate, skew


@dataclass(frozen=True)
class OftOptions(Options):
    block_size: int = 32
    """Features b in a block; where b does not divide a site's inputs, the nearest divisor."""
    terms: int | None = 5
    """Length of the series in place of Cayley's exact inverse, at least 3; None is exact."""
    share: bool = False
    """One block for the whole input, used over and over."""
    radius: float | None = None
    """Constrained OFT: every |Q_i| stays within radius / sqrt(n) (PEFT's eps: 6e-5)."""
    block_dropout: float = 0.0
    """Probability of leaving a block as it is in a training step."""

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise PlaitError(f"block_size must be at least 2, not {self.block_size}.")
        if self.terms is not None and self.terms < 3:
            raise PlaitError(f"terms must be at least 3, or None, not {self.terms}.")
        if not 0 <= self.block_dropout < 1:
            raise PlaitError(f"block_dropout must lie in [0, 1), not {self.block_dropout}.")

    def blocks(self, site: Site) -> tuple[int, int]:
        """(blocks with numbers of their own, their size) at a site."""
        size = nearest_divisor(site.in_features, self.block_size)
        if size < 2:
            raise PlaitError(
                f"no divisor of the {site.in_features} inputs of {site.path!r} is near "
                f"block_size={self.block_size}; set another there with overrides=."
            )
        return 1 if self.share else site.in_features // size, size


class OftDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(depends_on_base=True)
    options: OftOptions
    q: Tensor

    def build(self) -> None:
        blocks, size = self.options.blocks(self.site)
        self.size = size
        self.parameter("q", blocks, size * (size - 1) // 2)

    def change(self) -> Tensor:
        """R - I [n, b, b], or [1, b, b] with one block for all."""
        C = cayley(skew(self._within(), self.size), self.options.terms)
        if self.training and self.options.block_dropout:
            kept = torch.rand(len(C), 1, 1, device=C.device) >= self.options.block_dropout
            C = C * kept
        return C

    def _within(self) -> Tensor:
        """q, inside the ball that `radius` draws around 0."""
        if self.options.radius is None:
            return self.q
        limit = self.options.radius / math.sqrt(2 * len(self.q))  # |Q|^2 is twice |q|^2
        length = torch.linalg.vector_norm(self.q.detach(), dim=1, keepdim=True)
        shrink = limit / length.clamp_min(limit)
        if not (self.training and self.q.requires_grad):
            return self.q * shrink
        # Projected descent: the optimiser goes on from the ball. `.data` spares the graph of an
        # earlier pass a new version; repeated, the projection changes nothing.
        self.q.data.mul_(shrink)
        return self.q

    def dense(self) -> Tensor:
        return blockwise(self.base_weight(), self.change().mT)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.site.kind == "conv":
            return super().forward(x)
        return self.site.apply(blockwise(x, self.change()), self.site.weight())

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        if self.site.kind == "conv":  # patches overlap: there W is rotated, at in b out operations
            return super().adapt(*args, **kwargs)
        x = first_input(args, kwargs)
        return self.site.forward(rotate(x, self.change()))


def _count(site: Site, o: OftOptions) -> int:
    blocks, size = o.blocks(site)
    return blocks * size * (size - 1) // 2


METHOD = Method(
    name="oft",
    title="OFT: orthogonal finetuning",
    paper="Qiu et al., 2023, arXiv 2306.07280",
    axis="parameterisation",
    options=OftOptions,
    delta=OftDelta,
    count=per_site(_count),
    peft=OFT,
    example={"block_size": 4},
)
