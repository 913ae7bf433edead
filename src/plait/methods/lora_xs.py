"""LoRA-XS: train only an r x r matrix between frozen singular factors of W.

    x ──► A (r x in, frozen) ──► R (r x r, trained) ──► B (out x r, frozen) ──► * s ──► + W x

dW = s B R A, with B = U_r and A = S_r V_r^T from W's truncated SVD (the singular values on the
input side, as in the authors' code) and R ~ N(0, sigma^2), sigma = 1e-5: the start is the base
model to about sigma. s = alpha / r. A and B are saved with R: an SVD that is computed again
elsewhere may flip a sign or turn a pair of close directions, and R would mean another change.
R rides on B's side of the fused product, so that backward keeps A x [r, tokens] and never x.
Paper: Balazy et al., 2024, arXiv 2405.17604. Parameters: r^2 a site, whatever its width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.adapter import Method, PairDelta, PairOptions, Site, Traits, per_site
from plait.adapter.choices import fitting_rank
from plait.errors import PlaitError
from plait.linalg import LowRank, randomized_svd


@dataclass(frozen=True)
class LoraXsOptions(PairOptions):
    sigma: float = 1e-5
    """Standard deviation of R at the start."""
    svd: Literal["randomized", "exact"] = "randomized"
    """How W's leading singular triplets are found: in seconds, or to the last digit."""


class LoraXsDelta(PairDelta):
    traits = Traits(low_rank=True, zero_start=False)
    options: LoraXsOptions
    R: Tensor

    def build(self) -> None:
        rank = fitting_rank(self)
        self.frozen("A", rank, self.site.in_features)
        self.frozen("B", self.site.out_features, rank)
        self.parameter("R", rank, rank)

    def reset(self) -> None:
        U, S, Vh = self._svd()
        self.set_pair(A=S[:, None] * Vh, B=U)
        self.start("R", "normal")
        with torch.no_grad():
            self.R.mul_(self.options.sigma)

    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        rank, W = self.options.rank, self.base_weight()
        if self.options.svd == "randomized":
            return randomized_svd(W, rank, generator=self.generator("svd"))
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]

    def trained(self) -> LowRank:
        return LowRank(B=self.B @ self.R, A=self.A, scale=self.scaling)

    def hold_back(self) -> None:
        low = self.trained()
        self.register_buffer("held_A", low.A.detach().clone())
        self.register_buffer("held_B", low.B.detach().clone())

    def rank_axes(self) -> dict[str, int]:
        raise PlaitError(
            f"lora-xs at {self.site.path!r}: the rank of R cannot change in training; use lora."
        )


def _count(site: Site, o: LoraXsOptions) -> int:
    return o.rank**2


METHOD = Method(
    name="lora-xs",
    title="LoRA-XS: an r x r matrix between frozen singular factors",
    paper="Balazy et al., 2024, arXiv 2405.17604",
    axis="parameterisation",
    options=LoraXsOptions,
    delta=LoraXsDelta,
    count=per_site(_count),
    example={"rank": 5},
)
