"""LaMDA's delta: W's leading singular directions around a small square matrix.

    x ──► A (r x in, frozen) ──► S (r x r) ──► B (out x r) ──► * s ──► + W x

S B rides on B's side of the fused product, so that backward keeps A x [r, tokens] and never x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.adapter import PairDelta, PairOptions, Site, Traits
from plait.adapter.choices import check_choices, fitting_rank
from plait.errors import PlaitError
from plait.kernels._gate import exact_dtypes
from plait.linalg import LowRank, randomized_svd


@dataclass(frozen=True)
class SandwichOptions(PairOptions):
    rank: int = 32
    """Rank r of dW (paper: 32; its scripts: 64)."""
    alpha: float | None = 16.0
    """Numerator of the scaling alpha / r; None means 2 r, a scaling of 2."""
    start: Literal["spectral", "zero"] = "spectral"
    """S from W's singular values, held back from the output so that training starts at the base
    (the paper's), or S = 0: then nothing is held back, and B moves only once S has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, "lamda")


class SandwichDelta(PairDelta):
    kinds = frozenset({"linear"})
    traits = Traits(low_rank=True)
    optional = frozenset({"H"})
    options: SandwichOptions
    S: Tensor

    def build(self) -> None:
        rank = fitting_rank(self)
        self.frozen("A", rank, self.site.in_features)
        self.parameter("S", rank, rank)
        self.parameter("B", self.site.out_features, rank)

    def reset(self) -> None:
        U, sigma, Vh = randomized_svd(
            self.base_weight(), self.options.rank, generator=self.generator("svd")
        )
        self.set_pair(A=Vh, B=U)
        if self.options.start == "spectral":
            self.S.copy_(torch.diag(sigma / self.scaling))
            self.hold_back()

    def hold_back(self) -> None:
        """Subtract the present B S from now on; A is common to both, so the rank stays r."""
        self.register_buffer("H", (self.B @ self.S).detach().clone())

    def factors(self) -> LowRank:
        with exact_dtypes(self.B.device.type):  # the difference below is small beside its terms
            B = self.B @ self.S
        if "H" in self._buffers:
            B = B - self.get_buffer("H")
        return LowRank(B=B, A=self.A, scale=self.scaling)

    def rank_axes(self) -> dict[str, int]:
        raise PlaitError(
            f"lamda at {self.site.path!r}: the rank of S cannot change in training; use lora."
        )


def sandwich_count(site: Site, o: SandwichOptions) -> int:
    return o.rank * (o.rank + site.out_features)
