"""A sparse real spectrum applied to tokens without its inverse transform.

    dW[u, v] = 1 / (m n) sum_k c_k cos(2 pi (j_k u / m + l_k v / n))

is, token by token: rfft of x over the n inputs, a sparse product from its frequencies to those of
the m outputs, irfft. A cosine is even, so every (j, l) has a place in both half spectra; folding
it there may flip the sign of the imaginary part, so real and imaginary parts have values of their
own on one sparsity pattern.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from plait.methods._sparse import Layout, make_layout, sparse_linear


class Spectrum(NamedTuple):
    """The places of the coefficients of an [m, n] matrix, whole and folded."""

    shape: tuple[int, int]
    rows: Tensor
    columns: Tensor
    layout: Layout
    """Pattern [m / 2 + 1, n / 2 + 1] of the folded places."""
    where: Tensor
    """[k]: which entry of the pattern a coefficient adds to."""
    sign: Tensor
    """[k]: its sign for the imaginary part."""
    gain: Tensor
    """[m / 2 + 1]: 1 / n, halved where a frequency stands for itself and its mirror image."""


def make_spectrum(flat: Tensor, m: int, n: int, dtype: torch.dtype) -> Spectrum:
    """From positions `flat` in the flattened [m, n]."""
    j, l = flat // n, flat % n
    over_j, over_l = j > m // 2, l > n // 2
    wide = n // 2 + 1
    folded = torch.where(over_j, m - j, j) * wide + torch.where(over_l, n - l, l)
    unique, where = folded.unique(return_inverse=True)
    gain = torch.full((m // 2 + 1,), 0.5 / n, dtype=dtype, device=flat.device)
    gain[0] = 1 / n
    if m % 2 == 0:
        gain[-1] = 1 / n
    sign = torch.where(over_j == over_l, -1.0, 1.0).to(dtype)
    return Spectrum((m, n), j, l, make_layout(unique, m // 2 + 1, wide), where, sign, gain)


def spectral_linear(x: Tensor, c: Tensor, s: Spectrum) -> Tensor:
    """x [..., n] times dW^T, [..., m], at least in float32."""
    X = torch.fft.rfft(x.to(torch.promote_types(x.dtype, torch.float32)))
    empty = c.new_zeros(len(s.layout.columns))
    real = sparse_linear(X.real, empty.index_add(0, s.where, c), s.layout)
    imaginary = sparse_linear(X.imag, empty.index_add(0, s.where, c * s.sign), s.layout)
    return torch.fft.irfft(torch.complex(real, imaginary) * s.gain, n=s.shape[0])


def spectral_dense(c: Tensor, s: Spectrum) -> Tensor:
    """dW [m, n]: the real part of the inverse transform, from a half spectrum."""
    m, n = s.shape
    half = c.new_zeros(m, n // 2 + 1)
    for rows, columns in ((s.rows, s.columns), (-s.rows % m, -s.columns % n)):
        inside = columns <= n // 2
        half = half.index_put((rows[inside], columns[inside]), c[inside] / 2, accumulate=True)
    return torch.fft.irfft2(half.to(torch.promote_types(half.dtype, torch.complex64)), s=(m, n))
