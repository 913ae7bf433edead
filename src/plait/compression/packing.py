"""`pack`: an adapter's factors in 1 to 8 bits a number, in a file that loads as any other.

    dW = B A, balanced by SVD ──► codes and scales of B^T and A, rows = components ──► plait folder

Scales never span two components, whose sizes differ by orders of magnitude. With one bit a number
is a sign times its component's scale, otherwise a code of NormalFloat times its block's. Rounding
both factors on their own wastes what one could make up for the other, so they take turns: with A
rounded, the B of least error has a closed form, is rounded in turn, and so on; the best pair met is
kept, and its components' scales are solved for together. All of it in the factors' small Grams.

After "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy"
(Jie et al., 2023, arXiv 2307.16867), which trains in low precision. This rounds afterwards, which
at one bit costs far more than training in it; the error stands in the report.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from plait.adapter import Adapter
from plait.adapter.formats.coded import Coded
from plait.adapter.formats.plait import save_plait
from plait.compression.changes import Given, take_apart
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.quantization import BlockQuantizer, SignQuantizer

HALF = torch.finfo(torch.float16)


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote: `adapter` holds the very numbers that the file reads back as."""

    path: Path
    adapter: Adapter
    errors: dict[str, float]
    """||dW - dW'|| / ||dW|| of each site."""
    nbytes: int
    """Of the folder."""


Quantiser = BlockQuantizer | SignQuantizer


@dataclass(frozen=True)
class Rounded:
    """A tensor in low bits: its codes and the scales of their blocks."""

    quantizer: Quantiser
    codes: Tensor
    scales: Tensor

    @property
    def value(self) -> Tensor:
        """What the file will read back as."""
        return self.quantizer.decode(self.codes, self.scales.float())


@torch.no_grad()
def pack(
    adapter: Given,
    path: str | os.PathLike[str],
    bits: int = 1,
    *,
    block: int | None = None,
    rounds: int = 4,
    name: str | None = None,
) -> Packed:
    """Write `adapter` as a plain LoRA with factors of `bits` bits a number, and say what it costs.

    Args:
        adapter: of any method that is linear in its input; an `Adapter` or a path.
        path: the folder to write; `plait.load` and `read_adapter` read it like any other.
        bits: 1 to 8.
        block: at most so many numbers share a scale (the next lower divisor of a component's
            length); None means a whole component at one bit, else 64.
        rounds: turns in which B and A make up for each other's rounding; 0 rounds each alone.
        name: the result's; None keeps the adapter's.

    Changes of biases, replaced modules and parameters are stored as they are.
    """
    if not 1 <= bits <= 8 or rounds < 0 or (block is not None and block < 1):
        raise PlaitError(
            f"bits is 1 to 8, block at least 1, rounds at least 0; not {bits}, {block}, {rounds}."
        )
    parts = take_apart(adapter)
    groups: dict[tuple[int, bool], Coded] = {}
    lows, errors = {}, {}
    for site, low in parts.lows.items():
        exact, _ = low.to(dtype=torch.float32).truncate(energy=1.0)
        lows[site] = exact
        if exact.rank == 0:
            continue
        B, A = _round_pair(exact, bits, block, rounds)
        lows[site] = LowRank(B.value.mT.contiguous(), A.value)
        errors[site] = _error(exact, B, A) / float(exact.norm().square().sum().sqrt())
        for factor, leaf, turned in ((B, "B", True), (A, "A", False)):
            key = (factor.quantizer.block, turned)
            group = groups.setdefault(key, coded_group(factor.quantizer, turned))
            shape = lows[site].B.shape if turned else lows[site].A.shape
            group.add(f"{site}.{leaf}", shape, factor.codes, factor.scales)
    result = parts.rebuilt(lows, name)
    result.info["packed"] = {"bits": bits, "errors": errors}
    written = save_plait(result, Path(path), list(groups.values()))
    size = sum(file.stat().st_size for file in written.iterdir() if file.is_file())
    return Packed(written, result, errors, size)


def quantizer_for(bits: int, length: int, block: int | None = None) -> Quantiser:
    """For rows of `length`, with blocks that divide it."""
    most = block or (length if bits == 1 else 64)
    fitting = [n for n in range(max(1, most // 4), min(most, length) + 1) if length % n == 0]
    size = fitting[-1] if fitting else length
    return SignQuantizer(size) if bits == 1 else BlockQuantizer(bits, size)


def coded_group(quantizer: Quantiser, turned: bool = False) -> Coded:
    """Where tensors rounded in this way are gathered for a file."""
    book = quantizer.book(torch.zeros(1)).tolist()
    return Coded(quantizer.width, quantizer.block, book, turned, torch.float32)


def _round_pair(
    exact: LowRank, bits: int, block: int | None, rounds: int
) -> tuple[Rounded, Rounded]:
    """Codes of B^T and A whose product is near the exact one: the best of all turns."""
    b, a = exact.B.mT, exact.A
    for_b, for_a = (quantizer_for(bits, factor.shape[-1], block) for factor in (b, a))
    pair = rounded(for_b, b), rounded(for_a, a)
    best, least = pair, _error(exact, *pair)
    for turn in range(rounds + 1):
        if turn:
            B = rounded(for_b, _refit(b, a, pair[1].value))
            pair = B, rounded(for_a, _refit(a, b, B.value))
        for candidate in (pair, _rescaled(*pair, b, a)) if rounds else ():
            error = _error(exact, *candidate)
            if error < least:
                best, least = candidate, error
    return best


def rounded(quantizer: Quantiser, factor: Tensor) -> Rounded:
    """A tensor as a file will store it."""
    codes, scales = quantizer.encode(factor)
    return Rounded(quantizer, codes, _stored(scales))


def _stored(scales: Tensor) -> Tensor:
    """In half precision, where all of them lie in its range."""
    sizes = scales.abs()
    small = ((sizes > 0) & (sizes < HALF.tiny)).any()
    return scales.float() if small or sizes.max() > HALF.max else scales.half()


def _error(exact: LowRank, B: Rounded, A: Rounded) -> float:
    return float((LowRank(B.value.mT, A.value) - exact).norm().square().sum().sqrt())


def _refit(mine: Tensor, other: Tensor, rounded: Tensor) -> Tensor:
    """The factor X [r, n] of least ||mine^T other - X^T R||: (R R^T)^-1 R other^T mine."""
    R = rounded.double()
    inverse = torch.linalg.pinv(R @ R.mT, hermitian=True)
    return (inverse @ (R @ other.double().mT) @ mine.double()).to(mine.dtype)


def _rescaled(B: Rounded, A: Rounded, b: Tensor, a: Tensor) -> tuple[Rounded, Rounded]:
    """B with its components' scales solved for: least squares in r numbers, by Gram matrices."""
    P, Q = B.value.double(), A.value.double()
    gram = (P @ P.mT) * (Q @ Q.mT)
    target = ((P @ b.double().mT) * (Q @ a.double().mT)).sum(-1, keepdim=True)
    factor = torch.linalg.pinv(gram, hermitian=True) @ target
    blocks = P.shape[-1] // B.quantizer.block
    scales = B.scales.double() * factor.expand(*factor.shape[:-1], blocks).flatten()
    return Rounded(B.quantizer, B.codes, _stored(scales)), A
