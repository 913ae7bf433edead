"""The modes into which a matrix's sides are cut when it is read as a tensor, and products there."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.linalg.entanglement import prime_factors


def split_side(size: int, count: int) -> tuple[int, ...]:
    """`count` factors of `size`, descending, as near to each other as its prime factors allow.

    Prime factors are dealt out from the largest, each to the mode that is smallest so far; a mode
    that gets none is 1 (split_side(13, 2) is (13, 1)).
    """
    modes = [1] * count
    for prime in reversed(prime_factors(size)):
        modes[modes.index(min(modes))] *= prime
    return tuple(sorted(modes, reverse=True))


def near_factors(size: int, wanted: int = -1) -> tuple[int, int]:
    """size = small * large, as LyCORIS cuts a side: near_factors(128) is (8, 16).

    `wanted` itself where it divides `size`; else the greatest divisor up to the square root that is
    not above `wanted` (-1: no limit).
    """
    if wanted > 0 and size % wanted == 0:
        return wanted, size // wanted
    limit = size if wanted < 1 else wanted
    small = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and d <= limit)
    return small, size // small


def kron_all(tensors: Sequence[Tensor]) -> Tensor:
    """The Kronecker product of vectors, or of matrices, in their order."""
    return functools.reduce(lambda a, b: torch.kron(a, b), tensors)


def mode_products(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """x [..., prod of old_k] times matrices[k] [new_k, old_k] along each mode k."""
    lead, rest = x.shape[:-1], 1
    for M in reversed(matrices):
        if rest == 1:
            x = F.linear(x.reshape(-1, M.shape[1]), M)
        else:
            x = x.reshape(-1, M.shape[1], rest)
            x = M.expand(len(x), -1, -1).bmm(x)
        rest *= M.shape[0]
    return x.reshape(*lead, rest)
