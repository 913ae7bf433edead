"""Random numbers by position: every entry of a matrix has its own, whatever block asks for it.

A generator's stream depends on the order in which it is read; merging in blocks, threads or
processes has none. Here the number at (row, column) is a hash of a key and of that position
(the finaliser of splitmix64, Steele, Lea and Flood, 2014), the same on every device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685


def key_of(seed: int, *names: object) -> int:
    """A signed 64-bit key from a seed and names; Python's own hash changes between processes."""
    text = "\x1f".join([str(seed), *map(str, names)]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


def uniform_at(
    key: int, rows: range, columns: int, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Numbers in [0, 1) at positions (row, 0 .. columns - 1) for `rows`, float32 [rows, columns].

    24 bits each; independent of how rows are grouped into calls.
    """
    first = torch.arange(rows.start, rows.stop, rows.step, device=device, dtype=torch.long)
    position = first[:, None] * columns + torch.arange(columns, device=device)
    mixed = _mix(position * _GOLDEN + key)
    return _shift(mixed, 40).to(torch.float32) * (1.0 / (1 << 24))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's own of signed numbers keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
