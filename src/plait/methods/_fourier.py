"""A sparse real spectrum applied to tokens without its inverse transform.

    dW[u, v] = 1 / (m n) sum_k c_k cos(2 pi (j_k u / m + l_k v / n))

is, token by token: rfft over the n inputs, a sparse product from their frequencies to those of the
m outputs, irfft. A cosine is even, so every (j, l) has a place in both half spectra; folding it
there may conjugate, so the sparse product reads the frequencies of x and their conjugates, 2 (n / 2
+ 1) rows. Complex numbers are pairs of columns to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from plait.methods._sparse import Layout, make_layout


@dataclass(frozen=True)
class Spectrum:
    """The places of the coefficients of an [m, n] matrix, and its two transforms."""

    shape: tuple[int, int]
    rows: Tensor
    columns: Tensor
    layout: Layout
    """Pattern [m / 2 + 1, 2 (n / 2 + 1)] of the folded places."""
    where: Tensor
    """[k]: which entry of the pattern a coefficient adds to."""

    def values(self, c: Tensor) -> Tensor:
        """The pattern's values: two coefficients may have the same cosine."""
        m, n = self.shape
        return c.new_zeros(len(self.layout.columns)).index_add(0, self.where, c / (m * n))

    def enter(self, x: Tensor) -> Tensor:
        X = torch.fft.rfft(x).t()
        return _pairs(torch.cat([X, X.conj()]))

    def leave(self, S: Tensor) -> Tensor:
        return _real(_complex(S), self.shape[0])

    def back_enter(self, g: Tensor) -> Tensor:
        return _pairs(torch.fft.rfft(g).t().contiguous())

    def back_leave(self, S: Tensor) -> Tensor:
        plain, conjugate = _complex(S).chunk(2)
        return _real(plain + conjugate.conj(), self.shape[1])

    def dense(self, c: Tensor) -> Tensor:
        """dW [m, n] by one inverse transform, from a half spectrum."""
        m, n = self.shape
        half = c.new_zeros(m, n // 2 + 1)
        for rows, columns in ((self.rows, self.columns), (-self.rows % m, -self.columns % n)):
            inside = columns <= n // 2
            half = half.index_put((rows[inside], columns[inside]), c[inside] / 2, accumulate=True)
        whole = torch.promote_types(half.dtype, torch.complex64)
        return cast(Tensor, torch.fft.irfft2(half.to(whole), s=(m, n)))


def make_spectrum(flat: Tensor, m: int, n: int) -> Spectrum:
    """From positions `flat` in the flattened [m, n]."""
    j, l = flat // n, flat % n
    over_j, over_l, wide = j > m // 2, l > n // 2, n // 2 + 1
    # x meets exp(+i), so its own rfft is the conjugate of what an unfolded place needs.
    column = torch.where(over_l, n - l, l) + torch.where(over_j == over_l, wide, 0)
    folded = torch.where(over_j, m - j, j) * (2 * wide) + column
    unique, where = folded.unique(return_inverse=True)
    return Spectrum((m, n), j, l, make_layout(unique, m // 2 + 1, 2 * wide), where)


def _pairs(X: Tensor) -> Tensor:
    """[f, 2 T] of real numbers from complex [f, T]."""
    return torch.view_as_real(X.resolve_conj()).flatten(1)


def _complex(S: Tensor) -> Tensor:
    return torch.view_as_complex(S.unflatten(1, (-1, 2)))


def _real(S: Tensor, size: int) -> Tensor:
    """[T, size]: sum over f of Re(S[f] exp(2 pi i f u / size)), for S [size / 2 + 1, T]."""
    inner = slice(1, (size + 1) // 2)  # irfft counts these frequencies twice
    S[inner] *= 0.5
    return torch.fft.irfft(S.t(), n=size, norm="forward")
