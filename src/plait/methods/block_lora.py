"""Block-LoRA: the down projection is cut into n blocks that are one and the same small matrix.

    x ──► n slices of in/n features ──► summed ──► A (r x in/n) ──► B (out x r) ──► * s ──► + W x

dW = s B [A, A, ..., A], s = alpha / r: n - 1 products of A become additions, and backward keeps the
sum of the slices instead of x (six SmolLM2 layers, 512 tokens, n = 8: 8 MB beside the base's own,
where LoRA keeps 34 MB; a CPU step takes 1.09 of LoRA's). In return dW is blind to how a sum is
shared among the slices, which hurts where slices are heads with roles of their own. One block is
LoRA. A starts at U(-1/sqrt(in/n), 1/sqrt(in/n)), its own fan-in, and B at zero.
What the paper says of its blocks ("sharing all down-projection sub-matrices") has another reading,
`split="rank"`: A (r/n x in) is shared by n parts of the rank, each with a B_i (out x r/n) of its
own, dW = s (B_1 + ... + B_n) A. Both train the same number of parameters.
Paper: Zhou et al., 2025, arXiv 2501.16720. Parameters: r (in / n + out) a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from plait import kernels
from plait.adapter import Delta, Method, PairOptions, Site, Traits, first_input, per_site
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.linalg import LowRank


@dataclass(frozen=True)
class BlockLoraOptions(PairOptions):
    rank: int = 2
    """Rank r (paper, as CLIP-LoRA: 2)."""
    alpha: float | None = 1.0
    """Numerator of the scaling alpha / r (CLIP-LoRA: 1); None means 2 r, a scaling of 2."""
    blocks: int = 8
    """How many blocks n share one matrix ("eight arms"); must divide the side that is split."""
    split: Literal["input", "rank"] = "input"
    """Whether the input features or the rank are cut into blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, "block-lora")
        if self.blocks < 1:
            raise PlaitError(f"block-lora: blocks must be at least 1, not {self.blocks}.")

    def down(self, site: Site) -> tuple[int, int]:
        """The shape of A at a site."""
        by_input = self.split == "input"
        side = site.in_features if by_input else self.rank
        if side % self.blocks:
            what = "inputs" if by_input else "rank components"
            raise PlaitError(
                f"blocks={self.blocks} does not divide the {side} {what} at {site.path!r}; choose "
                "another number, or one for this site with overrides=."
            )
        part = side // self.blocks
        return (self.rank, part) if by_input else (part, site.in_features)


class BlockLoraDelta(Delta):
    options: BlockLoraOptions
    A: Tensor
    B: Tensor

    def build(self) -> None:
        # Slices are summed before the product, which the fused linear does not know.
        self.traits = Traits(low_rank=self.options.split == "rank")
        self.parameter("A", *self.options.down(self.site))
        self.parameter("B", self.site.out_features, self.options.rank)

    def reset(self) -> None:
        self.start("A", "kaiming_uniform")

    def _summed(self, x: Tensor) -> Tensor:
        """[..., in / n]: the sum of the n slices of x."""
        if self.dropout:
            x = F.dropout(x, self.dropout)
        return x.unflatten(-1, (self.options.blocks, -1)).sum(-2)

    def adapt(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = first_input(args, kwargs)
        y = self.site.forward(x)
        return kernels.lora_add(y, self._summed(x), self.A, self.B, self.options.scaling)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.options.split == "rank":
            return super().forward(x)
        u = F.linear(self._summed(x), self.A.to(x.dtype))
        return F.linear(u, (self.B * self.options.scaling).to(x.dtype))

    def factors(self) -> LowRank:
        n, scaling = self.options.blocks, self.options.scaling
        if self.options.split == "rank":
            return LowRank(B=self.B.unflatten(1, (n, -1)).sum(1), A=self.A, scale=scaling)
        return LowRank(B=self.B, A=torch.cat([self.A] * n, dim=1), scale=scaling)


def _count(site: Site, o: BlockLoraOptions) -> int:
    rows, columns = o.down(site)
    return rows * columns + o.rank * site.out_features


METHOD = Method(
    name="block-lora",
    title="Block-LoRA: one head, eight arms",
    paper="Zhou et al., 2025, arXiv 2501.16720",
    axis="parameterisation",
    options=BlockLoraOptions,
    delta=BlockLoraDelta,
    count=per_site(_count),
    example={"rank": 2, "blocks": 4},
)
