"""LoRA-GA: start a pair so that its first step is the best that 2r directions allow.

    G = mean dL/dW ~ U S V^T        A = z V^T[0:r]        B = z U[:, r:2r]        ("ArB2r")

With disjoint singular directions in A and B, the first gradient step of s B A is s^2 z^2 times the
best rank-2r approximation of G, the step of full fine-tuning. The factors' common size z is
d_out^(1/4) / sqrt(gamma) ("stable": activations do not grow with the width), 1 / s ("gd": the first
step is that approximation itself, whatever alpha), 1 ("unit"), or the mean root of W's leading
singular values over s ("weight"). The start s B A is held back in the adapter: W is not touched,
and the model starts at the base. Needs data for one gradient pass (the authors: 64 to 128 samples).
Works with any method that trains a pair. A rank above half of a site's shorter side is lowered.
Paper: Wang, Yu and Li, 2024, arXiv 2407.05000. Parameters: r (in + out) a site.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.adapter import Delta, Initializer, Method, PairDelta, Site
from plait.errors import PlaitError
from plait.initializers._pairs import require_pair
from plait.linalg import randomized_svd
from plait.methods.lora import METHOD as LORA
from plait.methods.lora import LoraDelta, LoraOptions
from plait.statistics import gradient_pass

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "gd", "unit", "weight")


@dataclass
class LoraGA(Initializer):
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    """Which of the 2r leading directions of G go to A and which to B: the first r to A, to B,
    alternating (even to B, odd to A), or at random."""
    scale: Literal["stable", "gd", "unit", "weight"] = "stable"
    """Size of the factors, see above."""
    gamma: float = 16.0
    """Divides the stable scale (authors: 8 to 128; larger starts smaller)."""
    niter: int = 4
    """Power iterations of G's randomised SVD."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS or self.scale not in SCALES or self.gamma <= 0:
            raise PlaitError(
                f"lora-ga: direction is one of {', '.join(DIRECTIONS)}, scale one of "
                f"{', '.join(SCALES)} and gamma positive, not {self.direction!r}, {self.scale!r} "
                f"and {self.gamma}."
            )

    def collect(
        self, model: nn.Module, sites: Sequence[Site], data: Iterable[Any] | None, rank: int
    ) -> dict[str, Any]:
        return dict(gradient_pass(model, sites, data or ()))

    def ranks(self, sites: Sequence[Site], statistics: dict[str, Any], rank: int) -> dict[str, int]:
        most = {s.path: min(s.shape[-2:]) // 2 for s in sites}
        return {path: half for path, half in most.items() if rank > half}

    def start(self, delta: Delta, statistics: Tensor) -> None:
        pair = require_pair(delta, "lora-ga")
        rank = pair.rank
        if 2 * rank > min(pair.site.shape[-2:]):
            raise PlaitError(
                f"lora-ga at {pair.site.path!r} {list(pair.site.shape)} needs 2r directions and "
                f"rank {rank} is above half the shorter side; lower it there."
            )
        if rank == 0:
            return
        G = statistics.to(pair.device, pair.dtype)
        # The authors sketch with 4r columns; only 2r of them are used.
        g, more = pair.generator("lora-ga"), 2 * rank
        U, _, Vh = randomized_svd(
            G, 2 * rank, oversample=more, power_iterations=self.niter, generator=g
        )
        for_a, for_b = self._directions(pair)
        size = self._size(pair)
        pair.set_pair(A=size * Vh[..., for_a, :], B=size * U[..., for_b])
        pair.hold_back()

    def _directions(self, pair: PairDelta) -> tuple[Tensor, Tensor]:
        r = pair.rank
        if self.direction == "random":
            order = torch.randperm(2 * r, generator=pair.generator("lora-ga", "directions"))
        elif self.direction == "ArBr":
            order = torch.cat([torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)])
        else:
            order = torch.arange(2 * r)
        first, last = order[:r], order[r:]
        return (last, first) if self.direction == "A2rBr" else (first, last)

    def _size(self, pair: PairDelta) -> float:
        """z."""
        if self.scale == "stable":
            return pair.site.out_features**0.25 / self.gamma**0.5
        if self.scale == "gd":
            return 1 / pair.scaling
        if self.scale == "unit":
            return 1.0
        g = pair.generator("lora-ga", "weight")
        _, S, _ = randomized_svd(pair.base_weight(), pair.rank, power_iterations=4, generator=g)
        return float((S / pair.scaling).sqrt().mean())


METHOD = Method(
    name="lora-ga",
    title="LoRA-GA: low-rank adaptation with gradient approximation",
    paper="Wang, Yu and Li, 2024, arXiv 2407.05000",
    axis="initialisation",
    options=LoraOptions,
    delta=LoraDelta,
    count=LORA.count,
    initializer=LoraGA,
)
