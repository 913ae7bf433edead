"""One level of a Daubechies wavelet along the first axis, a product with its synthesis matrix R.

    y[i] = sum_a lo[i + p - 2 a] s[a] + hi[i + p - 2 a] s[h + a]       y [size], s [2 h]

p = L - 2 for filters of length L, 2 h = size + L - 2 made even: ends that only some filters reach
are cut off. R is never formed: shifted rows are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from plait.errors import PlaitError

WAVELETS = tuple(f"db{n}" for n in range(1, 11))


@cache
def filters(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(lo, hi) of the synthesis: Daubechies' filters with n vanishing moments, extremal phase.

    lo has n zeros at z = -1 and, of the roots of the remaining half-band polynomial
    sum_k C(n - 1 + k, k) y^k with y = (2 - z - 1/z) / 4, those inside the unit circle; hi is lo
    backwards with alternating signs.
    """
    if name not in WAVELETS:
        raise PlaitError(f"no wavelet {name!r}; Plait has {', '.join(WAVELETS)}.")
    n = int(name[2:])
    binomials = [1.0]
    for k in range(1, n):
        binomials.append(binomials[-1] * (n - 1 + k) / k)
    roots = []
    for y in np.roots(binomials[::-1]):
        z = np.roots([1.0, 4 * y - 2, 1.0])
        roots.append(z[np.argmin(abs(z))])
    lo = np.real(np.poly([-1.0] * n + roots))
    lo *= np.sqrt(2) / lo.sum()
    hi = lo[::-1] * (-1.0) ** np.arange(2 * n)
    return tuple(lo.tolist()), tuple(hi.tolist())


def padded(size: int, name: str) -> int:
    """2 h, the coefficients that `size` outputs are made of."""
    return -(-(size + len(filters(name)[0]) - 2) // 2) * 2


def synthesis(s: Tensor, name: str, size: int) -> Tensor:
    """R s for s [2 h, T]: [size, T]."""
    lo_hi, halves = filters(name), s.chunk(2)
    taps = len(lo_hi[0]) // 2
    count = len(halves[0]) - taps + 1
    y = s.new_zeros(2 * count, s.shape[1])
    for filter_, half in zip(lo_hi, halves, strict=True):
        for t, factor in enumerate(filter_):  # even taps make even outputs, odd taps odd ones
            first = taps - 1 - t // 2
            y[t % 2 :: 2].add_(half[first : first + count], alpha=factor)
    return y[:size]


def analysis(x: Tensor, name: str) -> Tensor:
    """R^T x for x [size, T]: [2 h, T]."""
    lo_hi, half = filters(name), padded(len(x), name) // 2
    before = len(lo_hi[0]) - 2
    x = F.pad(x, (0, 0, before, 2 * half - len(x)))
    s = x.new_zeros(2 * half, x.shape[1])
    for filter_, part in zip(lo_hi, s.chunk(2), strict=True):
        for t, factor in enumerate(filter_):
            part.add_(x[t::2][:half], alpha=factor)
    return s


@dataclass(frozen=True)
class Wavelets:
    """R_in^T before and R_out behind the coefficients of a site [out, in]."""

    name: str
    shape: tuple[int, int]

    def enter(self, x: Tensor) -> Tensor:
        return analysis(x.t().contiguous(), self.name)

    def leave(self, S: Tensor) -> Tensor:
        return synthesis(S, self.name, self.shape[0]).t()

    def back_enter(self, g: Tensor) -> Tensor:
        return analysis(g.t().contiguous(), self.name)

    def back_leave(self, S: Tensor) -> Tensor:
        return synthesis(S, self.name, self.shape[1]).t()

    def dense(self, C: Tensor) -> Tensor:
        """R_out C R_in^T [out, in]."""
        half = synthesis(C, self.name, self.shape[0])
        return synthesis(half.t(), self.name, self.shape[1]).t()


def quarters(flat: Tensor, shape: Sequence[int], size: Sequence[int]) -> Tensor:
    """Positions in the flattened coefficients [2 h, 2 h'] for positions in the flattened `shape`.

    A place is centred in the larger `size`, whose quarters are then: averages, differences along
    the rows' axis, along the columns' axis, along both (the order of PEFT, which has those two
    change places against R_out C R_in^T).
    """
    (rows, columns), (tall, wide) = shape, size
    i, j = flat // columns + (tall - rows) // 2, flat % columns + (wide - columns) // 2
    swap = (i < tall // 2) != (j < wide // 2)
    i, j = (
        torch.where(swap, (i + tall // 2) % tall, i),
        torch.where(swap, (j + wide // 2) % wide, j),
    )
    return i * wide + j
