"""One level of a Daubechies wavelet, along the last axis, as a product with its synthesis matrix R.

    y[i] = sum_a lo[i + p - 2 a] s[a] + hi[i + p - 2 a] s[h + a]       y [size], s [2 h]

p = L - 2 for filters of length L, 2 h = size + L - 2 made even: ends that only some filters reach
are cut off. R is never formed: windows of the input are multiplied by a small matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """R s for s [..., 2 h]: [..., size]."""
    bank = _bank(name, s)
    taps = len(bank) // 2
    # Even taps make even outputs and odd taps odd ones, and a window's last entry meets tap 0 or 1.
    phases = bank.view(taps, 2, 2).flip(0).permute(2, 0, 1).reshape(2 * taps, 2)
    windows = s.unflatten(-1, (2, -1)).unfold(-1, taps, 1)  # [..., 2, places, taps]
    pairs = windows.transpose(-3, -2).flatten(-2) @ phases
    return pairs.flatten(-2)[..., :size]


def analysis(x: Tensor, name: str) -> Tensor:
    """R^T x for x [..., size]: [..., 2 h]."""
    bank, size = _bank(name, x), x.shape[-1]
    x = F.pad(x, (len(bank) - 2, padded(size, name) - size))
    return (x.unfold(-1, len(bank), 2) @ bank).transpose(-2, -1).flatten(-2)


def _bank(name: str, like: Tensor) -> Tensor:
    """[L, 2]: lo and hi."""
    return torch.tensor(filters(name), dtype=like.dtype, device=like.device).t()


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
