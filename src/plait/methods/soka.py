"""SoKA: a sum of Kronecker products that starts at the principal Kronecker terms of W.

    dW = sum_k A_k kron B_k - (the same sum at the start)      A_k [m, n], B_k [p, q], k = 1 .. K

out = m p and in = n q are cut near their square roots. Read as the m n x p q matrix of its p x q
blocks, a Kronecker product has rank 1, so the SVD of W read that way gives the best sums of
Kronecker products: A_k = sqrt(sigma_k) U_k and B_k = sqrt(sigma_k) V_k (Van Loan, Pitsianis, 1993).
K is the least of: the terms that hold `energy` of ||W||^2, the elbow of the spectrum, and `terms`.
The start is held back (saved, not trained) instead of being taken out of W: training begins at the
base model in bits, and W stays as it is. A step multiplies with the factors where that is cheaper
(few terms, wide layers); elsewhere it forms W + dW for one product (2 K out in multiplications a
forward), keeps no dW, and takes three products of W's size where LoRA takes two.
Paper: Chong, Qu, 2025, arXiv 2506.15251. Parameters: K (m n + p q) a site.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, Site, first_input, per_site
from plait.errors import PlaitError
from plait.methods._folded import folded_linear, has_plain_weight
from plait.methods._kronecker import from_blocks, kron_apply, to_blocks
from plait.methods._kronecker_svd import kronecker_terms
from plait.methods._modes import near_factors
from plait.methods._ranges import check_ranges


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
        check_ranges(self, "terms")
        if not 0 < self.energy <= 1 or self.factor == 0 or self.factor < -1:
            raise PlaitError(
                f"energy ({self.energy}) must lie in (0, 1], and factor ({self.factor}) be -1 or "
                "positive."
            )

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
        o = self.options
        most, (m, n), _ = o.shapes(self.site)
        A, B = kronecker_terms(self.base_weight(), m, n, most, o.energy, o.elbow)
        self.options = dataclasses.replace(o, terms=len(A))
        self.build()
        for name, value in (("A", A), ("held_A", A), ("B", B), ("held_B", B)):
            getattr(self, name).copy_(value)

    def make(self, A: Tensor, B: Tensor) -> Tensor:
        blocks = A.flatten(1).t() @ B.flatten(1) - self.held_A.flatten(1).t() @ self.held_B.flatten(
            1
        )
        return from_blocks(blocks, A.shape[1:], B.shape[1:])

    def pull(self, G: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        blocks = to_blocks(G, A.shape[1], A.shape[2])
        grad_A = B.flatten(1) @ blocks.t()
        return grad_A.view_as(A), (A.flatten(1) @ blocks).view_as(B)

    def dense(self) -> Tensor:
        return self.make(self.A, self.B)

    def _by_factors(self, dtype: torch.dtype) -> bool:
        # Multiplications a token, forward and backward, of the factors against those that forming
        # dW adds: g^T x, and in half precision, where W + dW would lose dW, the products with dW.
        # Small products run at about half the speed of large ones.
        (K, m, n), (_, p, q) = self.A.shape, self.B.shape
        formed = 3 if dtype.itemsize < 4 else 1
        return 2 * 6 * K * n * p * (q + m) < formed * m * n * p * q

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        x = first_input(args, kwargs)
        if self.dropout or self._by_factors(x.dtype) or not has_plain_weight(self.site):
            return super().adapt(*args, **kwargs)
        return folded_linear(x, self, (self.A, self.B), self.site.weight(), self.site.bias())

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = F.dropout(x, self.dropout) if self.dropout else x
        if not self._by_factors(x.dtype):
            return folded_linear(x, self, (self.A, self.B))
        # Two sums of one form, so that they cancel exactly at the start.
        return kron_apply(x, self.A, self.B) - kron_apply(x, self.held_A, self.held_B)


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
