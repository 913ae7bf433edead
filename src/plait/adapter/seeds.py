"""Frozen random tensors that are regenerated from a seed instead of stored.

Every tensor has its own stream, named by (adapter seed, place, tensor name), so that adding a site
or reordering them changes nobody else's draw. Drawn on the CPU in float32: CUDA's generator gives
other numbers for the same seed. A checksum per tensor is kept in the file and compared after
loading, because a later torch may draw differently.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlaitError

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


def generator(seed: int, *names: str) -> torch.Generator:
    """A CPU generator for the stream named `names` under `seed`."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fresh_seed() -> int:
    """A seed drawn from torch's global generator, so that torch.manual_seed governs it."""
    return int(torch.randint(2**31 - 1, ()).item())


def kaiming_uniform(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the start of nn.Linear and of LoRA's A."""
    bound = 1 / math.sqrt(max(shape[-1], 1))
    return torch.empty(shape).uniform_(-bound, bound, generator=g)


def xavier_uniform(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    bound = math.sqrt(6 / max(shape[-1] + shape[-2], 1))
    return torch.empty(shape).uniform_(-bound, bound, generator=g)


def uniform(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.empty(shape).uniform_(-1, 1, generator=g)


def normal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.empty(shape).normal_(generator=g)


def orthogonal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    rows, columns = shape[-2:]
    q, r = torch.linalg.qr(torch.empty(max(rows, columns), min(rows, columns)).normal_(generator=g))
    q = q * torch.sign(torch.diagonal(r))
    return q if rows >= columns else q.t().contiguous()


DRAWS: dict[str, Draw] = {
    "kaiming_uniform": kaiming_uniform,
    "xavier_uniform": xavier_uniform,
    "uniform": uniform,
    "normal": normal,
    "orthogonal": orthogonal,
}


def draw(kind: str, shape: tuple[int, ...], seed: int, *names: str) -> Tensor:
    """A float32 CPU tensor of `shape` from the distribution `kind`."""
    if kind not in DRAWS:
        raise PlaitError(f"no distribution {kind!r}; known: {', '.join(DRAWS)}.")
    return DRAWS[kind](shape, generator(seed, *names))


def checksum(tensor: Tensor, start: int = 0) -> int:
    """CRC-32 of the tensor's bytes (on the CPU, contiguous), or of those behind others' `start`."""
    flat = tensor.detach().cpu().contiguous().flatten()
    data: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return zlib.crc32(data, start)
