"""SoKA: a sum of Kronecker products that starts at the principal Kronecker terms of W.

    dW = sum_k A_k kron B_k - (the same sum at the start)      A_k [m, n], B_k [p, q], k = 1 .. K

out = m p and in = n q are cut near their square roots. Read as the m n x p q matrix of its p x q
blocks, a Kronecker product has rank 1, so the SVD of W read that way gives the best sums of
Kronecker products: A_k = sqrt(sigma_k) U_k and B_k = sqrt(sigma_k) V_k (Van Loan, Pitsianis, 1993).
K is the least of: the terms that hold `energy` of ||W||^2, the elbow of the spectrum, and `terms`.
The start is held back (saved, not trained) instead of being taken out of W: training begins at the
base model in bits, and W stays as it is. Nothing of W's size is formed in a step; a token costs
2 K n p (q + m) multiplications forward.
Paper: Chong, Qu, 2025, arXiv 2506.15251. Parameters: K (m n + p q) a site.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, Site, per_site
from plait.errors import PlaitError
from plait.linalg import randomized_svd
from plait.methods._kronecker import kron_apply, kron_blocks, kron_dense
from plait.methods._modes import near_factors

WINDOW = 32  # leading values in which the elbow is looked for, at least


@dataclass(frozen=True)
class SokaOptions(Options):
    terms: int = 8
    """Most terms K of a site (paper: chosen by the spectrum; 8 to 128 at most)."""
    energy: float = 0.9
    """Share of ||W||^2 at which further terms are left out; 1 leaves none out."""
    elbow: bool = True
    """Also stop where the leading singular values bend most away from their chord."""
    factor: int = -1
    """Where to cut the sides: -1 near the square root, else the size of A's."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        if self.terms < 1 or not 0 < self.energy <= 1 or self.factor == 0 or self.factor < -1:
            raise PlaitError(
                f"terms ({self.terms}) must be at least 1, energy ({self.energy}) in (0, 1] and "
                f"factor ({self.factor}) -1 or positive."
            )
        if not 0 <= self.dropout < 1:
            raise PlaitError(f"dropout must lie in [0, 1), not {self.dropout}.")

    def shapes(self, site: Site) -> tuple[int, tuple[int, int], tuple[int, int]]:
        """K, (m, n) and (p, q) at a site."""
        (m, p), (n, q) = (near_factors(s, self.factor) for s in site.shape)
        return min(self.terms, m * n, p * q), (m, n), (p, q)


class SokaDelta(Delta):
    options: SokaOptions
    A: Tensor
    B: Tensor
    held_A: Tensor
    held_B: Tensor

    def build(self) -> None:
        K, small, large = self.options.shapes(self.site)
        self.parameter("A", K, *small)
        self.parameter("B", K, *large)
        self.frozen("held_A", K, *small)
        self.frozen("held_B", K, *large)

    def reset(self) -> None:
        most, (m, n), (p, q) = self.options.shapes(self.site)
        blocks = kron_blocks(self.base_weight(), m, n)
        window = min(max(2 * most, WINDOW), *blocks.shape)
        U, S, Vh = randomized_svd(blocks, window)
        K = min(choose_terms(S, blocks.square().sum(), self.options), most)
        self.options = dataclasses.replace(self.options, terms=K)
        self.build()
        root = S[:K].sqrt()
        for name in ("A", "held_A"):
            getattr(self, name).copy_((U[:, :K] * root).t().reshape(K, m, n))
        for name in ("B", "held_B"):
            getattr(self, name).copy_((root[:, None] * Vh[:K]).reshape(K, p, q))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = F.dropout(x, self.dropout) if self.dropout else x
        # Two sums of one form, so that they cancel exactly at the start.
        return kron_apply(x, self.A, self.B) - kron_apply(x, self.held_A, self.held_B)

    def dense(self) -> Tensor:
        return kron_dense(self.A, self.B) - kron_dense(self.held_A, self.held_B)


def choose_terms(S: Tensor, total: Tensor, options: SokaOptions) -> int:
    """The number of terms that `energy` and `elbow` ask for, at least 1.

    S holds the leading singular values, descending; `total` is the sum of all their squares.
    """
    enough = int((S.square().cumsum(0) < options.energy * total).sum()) + 1
    span = S[0] - S[-1]
    if not options.elbow or len(S) < 3 or not span > 0:
        return enough
    chord = 1 - torch.linspace(0, 1, len(S), dtype=S.dtype, device=S.device)
    below, place = (chord - (S - S[-1]) / span).max(0)
    # The value at the bend is the first of the flat part. A spectrum above its chord has no bend.
    return min(enough, max(int(place), 1)) if below > 1e-6 else enough


def _count(site: Site, o: SokaOptions) -> int:
    K, (m, n), (p, q) = o.shapes(site)
    return K * (m * n + p * q)


METHOD = Method(
    name="soka",
    title="SoKA: singular value decomposition on Kronecker adaptation",
    paper="Chong, Qu, 2025, arXiv 2506.15251",
    axis="parameterisation",
    options=SokaOptions,
    delta=SokaDelta,
    count=per_site(_count),
    example={"terms": 2},
)
