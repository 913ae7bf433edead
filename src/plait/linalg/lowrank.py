"""`LowRank`: a matrix kept as scale * B @ A, with an algebra that never forms the product."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from plait.linalg.factored import (
    product_inner,
    product_leading,
    product_norm,
    product_singular_values,
    product_svd,
    rank_for_energy,
)
from plait.linalg.precision import require_finite, working_dtype

Index = int | slice | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """The matrix scale * B @ A, held as its factors.

        in ──► A [..., r, in] ──► B [..., out, r] ──► * scale ──► out

    Leading dimensions (stacked experts) are batch dimensions and must agree. Everything but
    `dense` costs O((out + in) r) memory. Arithmetic runs in float32 (float64 for float64 factors).
    A `LowRank` result and `matmul` come back in the caller's dtype; measurements (`inner`, `norm`,
    `cosine`, `svd`, `singular_values`, `effective_rank`) stay in working precision, since rounding
    an orthonormal basis to bfloat16 would cost its orthogonality. Differentiable where torch is.

    Raises ValueError when the factors do not fit each other.
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        B, A = self.B, self.A
        fits = B.ndim >= 2 and A.ndim >= 2
        if not fits or B.shape[-1] != A.shape[-2] or B.shape[:-2] != A.shape[:-2]:
            raise ValueError(
                f"LowRank: B {tuple(B.shape)} and A {tuple(A.shape)} do not multiply; "
                "give B [..., out, r] and A [..., r, in] with equal leading dimensions"
            )
        if B.dtype != A.dtype or B.device != A.device:
            raise ValueError(
                f"LowRank: B is {B.dtype} on {B.device} but A is {A.dtype} on {A.device}; "
                "convert one of them first"
            )
        if not B.is_floating_point():
            raise ValueError(f"LowRank: factors are {B.dtype}; give floating-point tensors")
        object.__setattr__(self, "scale", float(self.scale))

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"LowRank({shape}, rank={self.rank}, scale={self.scale:g}, {self.dtype})"

    @classmethod
    def from_svd(
        cls, U: Tensor, S: Tensor, Vh: Tensor, dtype: torch.dtype | None = None
    ) -> "LowRank":
        """U diag(S) Vh as a LowRank of scale 1 whose factors each carry sqrt(S).

        The balanced split gives B and A the same spectrum, the square root of the product's: the
        smallest condition numbers that a pair can have, so that training on moves both factors
        alike and neither loses more than the other when rounded or quantised.
        """
        root = S.sqrt()
        dtype = dtype or U.dtype
        return cls((U * root.unsqueeze(-2)).to(dtype), (root.unsqueeze(-1) * Vh).to(dtype))

    @classmethod
    def weighted_sum(cls, items: Sequence["LowRank"], weights: Sequence[float]) -> "LowRank":
        """sum_i weights[i] * items[i] by concatenation; its rank is the sum of the ranks.

        Exact, but for the rounding of one factor where the scales differ: the scale of greatest
        magnitude is kept and the ratios (at most 1, so nothing overflows) go into the B factors.
        Raises ValueError for no items, unequal lengths or unequal shapes.
        """
        if not items or len(items) != len(weights):
            raise ValueError(
                f"LowRank.weighted_sum: {len(items)} items and {len(weights)} weights; "
                "give at least one item and one weight for each"
            )
        for item in items[1:]:
            items[0]._require_same_shape(item, "sum")
        scales = [item.scale * float(weight) for item, weight in zip(items, weights, strict=True)]
        common = max(scales, key=abs)
        dtype = functools.reduce(torch.promote_types, [item.dtype for item in items])
        Bs = [
            _times(item.B.to(dtype), scale / common if common else 1.0)
            for item, scale in zip(items, scales, strict=True)
        ]
        As = [item.A.to(dtype) for item in items]
        return cls(torch.cat(Bs, dim=-1), torch.cat(As, dim=-2), common)

    @property
    def shape(self) -> torch.Size:
        """(..., out, in) of the matrix represented."""
        return torch.Size((*self.B.shape[:-1], self.A.shape[-1]))

    @property
    def rank(self) -> int:
        """Width r of the factors: an upper bound of the matrix's rank."""
        return self.B.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        return self.B.device

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The product [..., out, in], in `dtype` (default: the factors')."""
        work = working_dtype(self.dtype, dtype or self.dtype)
        return (_times(self.B.to(work), self.scale) @ self.A.to(work)).to(dtype or self.dtype)

    def rows(self, index: Index) -> "LowRank":
        """The selected output rows, as a LowRank; an int selects one row and keeps the dimension.

        `index` is an int, a slice (a view, no copy), a list of ints, or an index or bool tensor.
        """
        return LowRank(self.B[..., _keep_dim(index, self.shape[-2]), :], self.A, self.scale)

    def columns(self, index: Index) -> "LowRank":
        """The selected input columns, as a LowRank; indices as for `rows`."""
        return LowRank(self.B, self.A[..., _keep_dim(index, self.shape[-1])], self.scale)

    def transpose(self) -> "LowRank":
        """The transposed matrix [..., in, out], sharing memory."""
        return LowRank(self.A.mT, self.B.mT, self.scale)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "LowRank":
        """The same matrix with both factors on `device` and in `dtype`."""
        B, A = (factor.to(device=device, dtype=dtype) for factor in (self.B, self.A))
        return LowRank(B, A, self.scale)

    def __add__(self, other: "LowRank") -> "LowRank":
        if not isinstance(other, LowRank):
            return NotImplemented
        return LowRank.weighted_sum([self, other], [1.0, 1.0])

    def __sub__(self, other: "LowRank") -> "LowRank":
        if not isinstance(other, LowRank):
            return NotImplemented
        return LowRank.weighted_sum([self, other], [1.0, -1.0])

    def __mul__(self, factor: float) -> "LowRank":
        if not isinstance(factor, Real):
            return NotImplemented
        return LowRank(self.B, self.A, self.scale * float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> "LowRank":
        return self * -1.0

    def matmul(self, x: Tensor) -> Tensor:
        """scale * x A^T B^T for x [..., in], giving [..., out] in x's dtype.

        With batch dimensions, x is [..., tokens, in] and broadcasts against them; a single vector
        or another input width is a ValueError.
        """
        if x.shape[-1] != self.shape[-1] or (x.ndim < 2 < self.B.ndim):
            raise ValueError(
                f"LowRank.matmul: x {tuple(x.shape)} does not fit a matrix {tuple(self.shape)}; "
                "give [..., in], or [..., tokens, in] for stacked matrices"
            )
        work = working_dtype(x.dtype, self.dtype)
        hidden = x.to(work) @ self.A.to(work).mT
        return (_times(hidden, self.scale) @ self.B.to(work).mT).to(x.dtype)

    def inner(self, other: "LowRank") -> Tensor:
        """Frobenius inner product, shape [...] (0-dim without batch), by r x r Gram matrices."""
        self._require_same_shape(other, "inner")
        value = product_inner(self.B, self.A, other.B, other.A)
        return (value * (self.scale * other.scale)).to(working_dtype(self.dtype, other.dtype))

    def norm(self) -> Tensor:
        """Frobenius norm, shape [...], never negative, accurate also after cancellation."""
        value = product_norm(self.B, self.A) * abs(self.scale)
        return value.to(working_dtype(self.dtype))

    def cosine(self, other: "LowRank") -> Tensor:
        """Cosine of the angle between two matrices, shape [...], in [-1, 1]; 0 if either is 0."""
        self._require_same_shape(other, "cosine")
        value = product_inner(self.B, self.A, other.B, other.A)
        lengths = product_norm(self.B, self.A) * product_norm(other.B, other.A)
        sign = math.prod((s > 0) - (s < 0) for s in (self.scale, other.scale))
        cosine = torch.where(lengths == 0, torch.zeros_like(value), sign * value / lengths)
        return cosine.clamp(-1, 1).to(working_dtype(self.dtype, other.dtype))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [..., out, k], S [..., k] descending, Vh [..., k, in] with k = min(rank, out, in).

        By QR of both factors and the SVD of the small core. Raises ValueError for NaN or infinity.
        """
        self._require_finite("svd")
        return product_svd(self.B, self.A, self.scale)

    def singular_values(self) -> Tensor:
        """S of `svd`, without the cost of the vectors."""
        self._require_finite("singular_values")
        return product_singular_values(self.B, self.A, self.scale)

    def effective_rank(self) -> Tensor:
        """exp of the entropy of S / sum(S), shape [...], from 1 to the rank; 0 for a zero matrix.

        Roy and Vetterli, "The effective rank: a measure of effective dimensionality", 2007.
        """
        S = self.singular_values()
        total = S.sum(-1)
        p = S / torch.where(total == 0, 1, total).unsqueeze(-1)
        return torch.where(total == 0, 0, torch.exp(-torch.xlogy(p, p).sum(-1)))

    def truncate(
        self, rank: int | None = None, energy: float | None = None
    ) -> tuple["LowRank", float]:
        """The best approximation of lower rank (Eckart-Young), and the energy that it drops.

        `rank`: at most this many singular values are kept (fewer if the matrix has fewer).
        `energy`, in (0, 1]: as few as hold this fraction of the squared Frobenius norm; values at
        rounding level never count, so 1.0 finds the numerical rank. With both, the smaller result
        is taken. Stacked matrices share one rank, the greatest that any of them needs. The result
        has scale 1 and sqrt(S) on both sides (see `from_svd`: better conditioned). Dropped energy
        is a fraction in [0, 1] of the squared norm, pooled over the stack, before the factors are
        rounded to this dtype. Raises ValueError for NaN, or for neither or an impossible argument.
        """
        _check_truncation(rank, energy)
        self._require_finite("truncate")
        if energy is None and rank is not None and rank < min(self.rank, *self.shape[-2:]):
            leading = product_leading(self.B, self.A, self.scale, rank)
            if leading is not None:
                U, S, Vh, total = leading
                dropped = max(0.0, 1 - float(S.square().sum()) / total) if total else 0.0
                return LowRank.from_svd(U, S, Vh, self.dtype), dropped
        U, S, Vh = product_svd(self.B, self.A, self.scale)
        keep = S.shape[-1] if rank is None else min(rank, S.shape[-1])
        if energy is not None:
            keep = min(keep, rank_for_energy(S, energy, max(self.shape[-2:])))
        squares = S.to("cpu", torch.float64).square()
        total = float(squares.sum())
        dropped = float(squares[..., keep:].sum()) / total if total else 0.0
        kept = LowRank.from_svd(U[..., :keep], S[..., :keep], Vh[..., :keep, :], self.dtype)
        return kept, dropped

    def balanced(self) -> "LowRank":
        """The same matrix with scale 1, orthogonal factor columns, and sqrt(S) on both sides."""
        self._require_finite("balanced")
        return LowRank.from_svd(*product_svd(self.B, self.A, self.scale), self.dtype)

    def _require_finite(self, method: str) -> None:
        where = f"LowRank.{method}"
        require_finite(self.B, "factor B", where)
        require_finite(self.A, "factor A", where)
        if not math.isfinite(self.scale):
            raise ValueError(f"{where}: scale is {self.scale}; give a finite scale")

    def _require_same_shape(self, other: "LowRank", what: str) -> None:
        if self.shape != other.shape:
            raise ValueError(
                f"LowRank.{what}: shapes {tuple(self.shape)} and {tuple(other.shape)} differ; "
                "both must describe the same site"
            )


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor


def _keep_dim(index: Index, size: int) -> slice | Sequence[int] | Tensor:
    if isinstance(index, int):
        # torch lets any index pass when the result is empty, as it is at rank 0.
        if not -size <= index < size:
            raise IndexError(f"LowRank: index {index} is outside a side of {size}")
        return [index]
    if isinstance(index, Tensor):
        return index.reshape(-1)
    return index


def _check_truncation(rank: int | None, energy: float | None) -> None:
    if rank is None and energy is None:
        raise ValueError("LowRank.truncate: neither rank nor energy is given; give one or both")
    if rank is not None and rank < 0:
        raise ValueError(f"LowRank.truncate: rank is {rank}; give 0 or more")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"LowRank.truncate: energy is {energy}; give a fraction in (0, 1]")
