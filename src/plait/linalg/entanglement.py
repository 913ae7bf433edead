"""Entanglement entropy of a weight update: how strongly its parts hang together across every cut.

A matrix M [out, in] is read as a vector over a chain of small dimensions d_1 .. d_L (those of the
rows, then of the columns, row-major) and scaled to length 1. Across the cut after d_1 .. d_c it
has singular values s_i; with p_i = s_i^2 the entropy is S_c = -sum_i p_i ln p_i, in nats: 0 where M
is a product of its two parts, at most the log of the smaller part, and exp(S_c) is the effective
number of terms. A LoRA of rank r has at most ln r at the cut between rows and columns. Chen et al.,
"Artificial Entanglement in the Fine-Tuning of Large Language Models", 2026, arXiv 2601.06788.

Everything runs in float64 (float32 on MPS). A `LowRank` is never formed: with orthonormal columns
on the other side of the cut, only the factor that the cut goes through is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from plait.linalg.lowrank import LowRank
from plait.linalg.precision import accumulator_dtype, require_finite

NEGLIGIBLE = 1e-14  # probabilities below this are rounding


def entropy_profile(
    M: Tensor | LowRank,
    row_dims: Sequence[int] | None = None,
    column_dims: Sequence[int] | None = None,
) -> Tensor:
    """S_1 .. S_{L-1} [L - 1] of M [out, in] in nats; zeros for a zero matrix.

    `row_dims` multiply to out and `column_dims` to in; None takes the prime factors, ascending, so
    that sides of 2^a and 2^b give a chain of a + b two-dimensional sites. The cut between rows and
    columns is number len(row_dims). Raises ValueError for dimensions that do not multiply to M's,
    a matrix that is not two-dimensional, NaN or infinity.
    """
    if len(M.shape) != 2:
        raise ValueError(f"entropy_profile: shape {tuple(M.shape)}; give one matrix [out, in]")
    rows = _dims(row_dims, M.shape[0], "row_dims")
    columns = _dims(column_dims, M.shape[1], "column_dims")
    factors = (M.B, M.A) if isinstance(M, LowRank) else (M,)
    for factor in factors:
        require_finite(factor, "the matrix", "entropy_profile")
    left, right = _two_sides(M)
    before = _products(rows)
    after = _products(columns)
    parts = [left.reshape(size, -1) for size in before]
    parts += [right.reshape(-1, math.prod(columns) // size) for size in [1, *after][: len(columns)]]
    # The last cut through the rows and the first through the columns are one and the same.
    parts.pop(len(rows))
    values = [cut_entropy(part) for part in parts]
    return torch.stack(values) if values else left.new_zeros(0)


def cut_entropy(M: Tensor) -> Tensor:
    """S of the one cut between rows and columns of M [..., m, n], shape [...], in nats.

    Batched: the attention maps [heads, queries, keys] of a layer, for one. 0 for a zero matrix.
    """
    M = M.to(accumulator_dtype(M.device))
    M = M if M.shape[-2] <= M.shape[-1] else M.mT
    # Scaling by the greatest entry keeps the squares of tiny updates from vanishing.
    greatest = M.abs().amax((-2, -1), keepdim=True)
    M = M / torch.where(greatest > 0, greatest, 1.0)
    p = torch.linalg.eigvalsh(M @ M.mT).clamp_min(0)
    total = p.sum(-1, keepdim=True)
    p = p / torch.where(total > 0, total, 1.0)
    p = torch.where(p > NEGLIGIBLE, p, 0)
    return torch.special.entr(p).sum(-1)


def page_entropy(left: int, right: int) -> float:
    """The mean S of a random unit vector over left x right dimensions, in nats.

    What a change without any structure shows (Page, "Average entropy of a subsystem", 1993):
    sum_{k = n+1}^{m n} 1/k - (m - 1) / 2n with m <= n. A real vector's is lower by O(1 / n).
    """
    if min(left, right) < 1:
        raise ValueError(f"page_entropy: {left} and {right}; give two positive dimensions")
    small, large = sorted((left, right))
    return _harmonic(small * large) - _harmonic(large) - (small - 1) / (2 * large)


def prime_factors(size: int) -> list[int]:
    """The prime factors of `size`, ascending, with repetition; [1] for 1."""
    found, divisor = [], 2
    while divisor * divisor <= size:
        while size % divisor == 0:
            found.append(divisor)
            size //= divisor
        divisor += 1
    return found + ([size] if size > 1 or not found else [])


def _harmonic(n: int) -> float:
    """1 + 1/2 + .. + 1/n."""
    if n < 256:
        return sum(1 / k for k in range(1, n + 1))
    return math.log(n) + 0.5772156649015329 + 1 / (2 * n) - 1 / (12 * n**2)


def _dims(given: Sequence[int] | None, size: int, name: str) -> list[int]:
    if given is None:
        return prime_factors(size)
    if math.prod(given) != size or any(d < 1 for d in given):
        raise ValueError(f"entropy_profile: {name} {tuple(given)} do not multiply to {size}")
    return list(given)


def _products(dims: Sequence[int]) -> list[int]:
    """d_1, d_1 d_2, .. of all dims."""
    return [math.prod(dims[: i + 1]) for i in range(len(dims))]


def _two_sides(M: Tensor | LowRank) -> tuple[Tensor, Tensor]:
    """Matrices with M's singular values across all cuts of the rows, and of the columns."""
    if isinstance(M, Tensor):
        M = M.to(accumulator_dtype(M.device))
        return M, M
    wide = accumulator_dtype(M.device)
    B, A = M.B.to(wide) * M.scale, M.A.to(wide)
    R_B = torch.linalg.qr(B, mode="r").R
    R_A = torch.linalg.qr(A.mT, mode="r").R
    return B @ R_A.mT, R_B @ A
