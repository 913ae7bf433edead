"""LoLDU: W's own elimination factors, frozen, with r trained numbers between them.

    W = P L diag(D) U ~        x ──► U_r (r x in) ──► * d (r, trained) ──► P L_r (out x r) ──► * c

dW = c P L_r diag(d) U_r, with L unit lower and U unit upper triangular (partial pivoting) and r
their leading columns and rows; the paper's z is D_r + d, its frozen residual the rest of W. d = 0
("lu") starts at the base model; any other start of z does not, because the residual is W's own. The
factors are computed from W in float64 when the adapter is attached; a file holds d and which r rows
the pivots were, so that rounding elsewhere cannot choose others.
The order is that of elimination, not of importance: the r pivots are W's first r columns', and L_r,
U_r are neither orthogonal nor of one scale. d rides on B's side of the fused product.
Paper: Shi et al., 2024, arXiv 2410.13618. Parameters: r a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.adapter import Delta, Method, Options, Traits, per_site
from plait.adapter.choices import check_choices, fitting_rank
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.methods._elimination import choose_pivots, eliminate


@dataclass(frozen=True)
class LolduOptions(Options):
    rank: int = 64
    """Trained numbers r (paper: 64 to 1024); each costs (in + out) operations a token."""
    alpha: float | None = None
    """Numerator of the factor c = alpha / r; None means r, a factor of 1, as the paper advises."""
    start: Literal["lu", "uniform", "normal", "mean", "ones", "zeros"] = "lu"
    """Start of z: D itself (the base model), U(-m / 2, m / 2), N(m, s^2) or m, with m and s mean
    and deviation of D (the paper prefers "uniform"), 1 or 0."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        check_choices(self, "loldu")
        if self.rank < 1:
            raise PlaitError(f"rank must be at least 1, not {self.rank}.")
        if not 0 <= self.dropout < 1:
            raise PlaitError(f"dropout must lie in [0, 1), not {self.dropout}.")

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LolduDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    options: LolduOptions
    d: Tensor
    pivots: Tensor

    def build(self) -> None:
        rank = fitting_rank(self)
        self.traits = Traits(
            low_rank=True, depends_on_base=True, zero_start=self.options.start == "lu"
        )
        self.parameter("d", rank)
        self.frozen("pivots", rank, dtype=torch.int32)

    def reset(self) -> None:
        W = self.site.weight().detach()
        self.pivots.copy_(choose_pivots(W, self.options.rank))
        if self.options.start != "lu":
            D = eliminate(W, self.pivots.long())[1].cpu()
            self.d.copy_(self._start(D) - D)

    def _start(self, D: Tensor) -> Tensor:
        """z [r] at the start."""
        g, kind = self.generator("start"), self.options.start
        if kind == "uniform":
            return D.mean() * (torch.rand(D.shape, generator=g) - 0.5)
        if kind == "normal":
            spread = D.std() if len(D) > 1 else 0.0
            return D.mean() + spread * torch.randn(D.shape, generator=g)
        return torch.full_like(D, {"mean": D.mean().item(), "ones": 1.0, "zeros": 0.0}[kind])

    def attached(self) -> None:
        L, D, U = eliminate(self.site.weight().detach(), self.pivots.long())
        for name, value in zip("LDU", (L, D, U), strict=True):
            self.seeded_value(name, value.to(self.dtype))

    def seeded_tensors(self) -> dict[str, Tensor]:
        return {}  # L, D and U follow from W, not from the seed

    def factors(self) -> LowRank:
        if "L" not in self._buffers:
            self.attached()  # raises where there is no base, naming the site
        L, U = self.get_buffer("L"), self.get_buffer("U")
        return LowRank(B=L * self.d, A=U, scale=self.options.scaling)


METHOD = Method(
    name="loldu",
    title="LoLDU: low-rank adaptation via lower-diag-upper decomposition",
    paper="Shi et al., 2024, arXiv 2410.13618",
    axis="parameterisation",
    options=LolduOptions,
    delta=LolduDelta,
    count=per_site(lambda site, o: o.rank),
)
