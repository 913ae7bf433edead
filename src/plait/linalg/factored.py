"""Spectrum and inner products of scale * B @ A from the factors, without forming the product.

Shapes: B [..., out, r], A [..., r, in]. With B = Qb Rb and A^T = Qa Ra (reduced QR),
scale * B A = Qb (scale * Rb Ra^T) Qa^T, so the SVD of the small core gives that of the product in
O((out + in) r^2 + r^3) instead of O(out * in * min(out, in)).
"""

import torch
from torch import Tensor

from plait.linalg.precision import accumulator_dtype, working_dtype

_TRUSTED = 1e-4
"""Of the largest singular value: what a Gram matrix in float64 gives to about 1e-8 of itself."""
_UNSPOILT = 1e-9
"""Of the product of both factors' squared norms: squares above it have seven digits left."""


def product_svd(B: Tensor, A: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """U [..., out, k], S [..., k] descending, Vh [..., k, in] with k = min(r, out, in).

    U, S and Vh come in working precision (float32, or float64 for float64 factors).
    """
    B, A = _working(B, A)
    if B.shape[-1] == 0:
        return B, B.new_zeros((*B.shape[:-2], 0)), A
    if _product_is_small(B, A):
        return torch.linalg.svd((B * scale) @ A, full_matrices=False)
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd((Rb * scale) @ Ra.mT, full_matrices=False)
    return Qb @ U, S, Vh @ Qa.mT


def product_leading(
    B: Tensor, A: Tensor, scale: float, rank: int
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """The `rank` leading triplets of scale * B @ A and the squared norm of all of them.

    Through the r x r Gram matrices of both factors in float64: with B^T B = L L^T the right
    singular vectors of B A are those of L^T A, and its squared singular values the eigenvalues of
    L^T A A^T L. A fraction of the QR route's work. Gram matrices square the spectrum, so the answer
    is None where the last triplet asked for is too small, beside the first or beside what cancels,
    to have come out well, and where B's columns depend on each other.
    """
    wide = accumulator_dtype(B.device)
    if wide != torch.float64 or rank == 0:
        return None
    b, a = B.to(wide), A.to(wide)
    gram, right = b.mT @ b, a @ a.mT
    L, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed.any()):
        return None
    squares, W = torch.linalg.eigh(L.mT @ right @ L)
    squares, W = squares.flip(-1)[..., :rank], W.flip(-1)[..., :rank]
    size = _trace(gram) * _trace(right)
    least = (_TRUSTED**2 * squares[..., 0]).maximum(_UNSPOILT * size)
    if bool((squares[..., -1] <= least).any()):
        return None
    S = squares.sqrt().unsqueeze(-2)
    weights = L @ W
    Vh = (weights / S).mT @ a
    U = b @ (right @ weights / S.square())  # B A V / S
    length = abs(scale)
    total = float((gram * right).sum()) * length**2
    return (U if scale >= 0 else -U), S.squeeze(-2) * length, Vh, total


def _trace(square: Tensor) -> Tensor:
    return square.diagonal(dim1=-2, dim2=-1).sum(-1)


def product_singular_values(B: Tensor, A: Tensor, scale: float) -> Tensor:
    """S [..., min(r, out, in)] descending, in working precision; cheaper than the full SVD."""
    B, A = _working(B, A)
    if B.shape[-1] == 0:
        return B.new_zeros((*B.shape[:-2], 0))
    if _product_is_small(B, A):
        return torch.linalg.svdvals((B * scale) @ A)
    return torch.linalg.svdvals(_core(B, A) * scale)


def product_inner(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
    """<B1 A1, B2 A2>_F = sum((B1^T B2) * (A1 A2^T)), shape [...], in the accumulator dtype."""
    return _gram_terms(B1, A1, B2, A2).sum((-2, -1))


def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """||B A||_F, shape [...], in the accumulator dtype.

    The Gram form squares the norm, so where its terms cancel (X - Y with Y close to X) it keeps
    only half the digits; there the norm of the triangular core, which squares nothing, is taken.
    """
    terms = _gram_terms(B, A, B, A)
    square = terms.sum((-2, -1))
    cancelled = square < 1e-6 * terms.abs().sum((-2, -1))
    if bool(cancelled.any()):
        wide = accumulator_dtype(B.device)
        return torch.linalg.matrix_norm(_core(B.to(wide), A.to(wide)))
    return square.clamp_min(0).sqrt()


def rank_for_energy(S: Tensor, energy: float, longest: int) -> int:
    """Fewest leading values of S [..., k] (descending) that hold `energy` of every row's squares.

    Values at rounding level of a matrix with longer side `longest` count as 0.
    """
    if S.numel() == 0:
        return 0
    noise = S[..., :1] * torch.finfo(S.dtype).eps * longest
    squares = torch.where(noise < S, S, 0).to("cpu", torch.float64).square()
    held = squares.cumsum(-1)
    short = held < energy * held[..., -1:]
    needed = short.sum(-1) + (held[..., -1] > 0)
    return int(needed.max())


def _working(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(B.dtype, A.dtype)
    return B.to(dtype), A.to(dtype)


def _product_is_small(B: Tensor, A: Tensor) -> bool:
    # From r = min(out, in) on, the dense product is no larger than the bigger factor, and the core
    # is as long as its short side, so QR only adds work. Measured on one CPU thread, 1024 x 256:
    # QR 13 ms, dense 21 ms at r = 192; 23 and 24 ms at r = 256; 36 and 24 ms at r = 384.
    return B.shape[-1] >= min(B.shape[-2], A.shape[-1])


def _core(B: Tensor, A: Tensor) -> Tensor:
    Rb = torch.linalg.qr(B, mode="r").R
    Ra = torch.linalg.qr(A.mT, mode="r").R
    return Rb @ Ra.mT


def _gram_terms(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
    wide = accumulator_dtype(B1.device)
    left = B1.to(wide).mT @ B2.to(wide)
    right = A1.to(wide) @ A2.to(wide).mT
    return left * right
