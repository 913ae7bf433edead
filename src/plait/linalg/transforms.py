"""Structured products: the Walsh-Hadamard transform and Kronecker products, never materialised."""

import torch
from torch import Tensor

from plait.linalg.precision import working_dtype

# Widest Hadamard block multiplied at once: a matrix product of this size is still bound by memory,
# so six butterfly stages cost one pass over x.
_BLOCK = 64


def wht(x: Tensor, *, normalize: bool = True) -> Tensor:
    """x [..., n] times the Hadamard matrix H_n in natural (Sylvester) order, in x's dtype.

    n must be a power of two (ValueError otherwise). `normalize=True` divides by sqrt(n), which
    makes the transform orthogonal and its own inverse; with False, H_n has entries +-1 and
    H_n H_n = n I. O(n log n) a row. H_n is the Kronecker product of small blocks: each pass
    multiplies the last block and turns it to the front, until the order is the first one again.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"wht: last dimension is {n}; pad it to a power of two")
    dtype = working_dtype(x.dtype)
    y = x.to(dtype).reshape(-1, n)
    left = n
    while left > 1:
        block = min(_BLOCK, left)
        y = (y.reshape(-1, n // block, block) @ _hadamard(block, y)).mT.reshape(-1, n)
        left //= block
    return (y / n**0.5 if normalize else y).reshape(x.shape).to(x.dtype)


def kron_matvec(x: Tensor, Aleft: Tensor, Bright: Tensor) -> Tensor:
    """x (Aleft kron Bright)^T for x [..., q * t], Aleft [p, q], Bright [s, t]: [..., p * s].

    With x read as a q x t matrix X, the result is Aleft X Bright^T; the cheaper of the two orders
    is taken. Computed in float32 (float64 stays), returned in x's dtype. Raises ValueError for
    sizes that do not fit.
    """
    (p, q), (s, t) = Aleft.shape, Bright.shape
    if x.shape[-1] != q * t:
        raise ValueError(
            f"kron_matvec: x has {x.shape[-1]} columns, but Aleft {tuple(Aleft.shape)} kron "
            f"Bright {tuple(Bright.shape)} has {q * t}"
        )
    dtype = working_dtype(x.dtype, Aleft.dtype, Bright.dtype)
    X = x.to(dtype).reshape(*x.shape[:-1], q, t)
    A, Bt = Aleft.to(dtype), Bright.to(dtype).mT
    left_first = p * t * (q + s) <= q * s * (t + p)
    Y = (A @ X) @ Bt if left_first else A @ (X @ Bt)
    return Y.reshape(*x.shape[:-1], p * s).to(x.dtype)


def _hadamard(n: int, like: Tensor) -> Tensor:
    H = like.new_ones(1, 1)
    pair = like.new_tensor([[1, 1], [1, -1]])
    while H.shape[0] < n:
        H = torch.kron(pair, H)
    return H
