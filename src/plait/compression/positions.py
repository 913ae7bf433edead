"""Sharing by positions: averaging adapters loses what each of them knew, a basis gives it back.

A bank keeps p basis vectors for every position and p numbers for every adapter there ("Towards
Reversible Model Merging for Low-rank Weights"):

    position t (row t of B, column t of A):   X_t = [x_1 ... x_n]  [r, n], x_i what adapter i has
    X_t = U S V^T     basis W_t = U_p [r, p]     coefficients C_t = W_t^T X_t [p, n]
    x_i ~ W_t C_t[:, i]

No basis of that size leaves less squared error in the factors: exactly the singular values beyond
p. Factors are determined only up to B G, G^-1 A, and different gauges share nothing, so adapters
are first brought to one: balanced by SVD, then turned by the rotation that takes each pair nearest
to the first adapter's (Procrustes). Errors are reported for dW, as the factors' errors multiply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from plait.adapter import Site
from plait.adapter.formats.coded import Coded
from plait.compression.bank import Bank, parts_of, sites_of
from plait.compression.changes import AdapterChanges, Given
from plait.compression.shelves import Shelf
from plait.errors import FormatError, PlaitError
from plait.linalg import LowRank

OF = "of:"


@dataclass
class PositionShelf(Shelf):
    """One site: bases [out + in, r, p] of the rows of B and columns of A, coefficients [n, ...]."""

    basis: Tensor
    coefficients: dict[str, Tensor]
    """{adapter: [out + in, p]}."""

    kind = "positions"

    @property
    def names(self) -> list[str]:
        return list(self.coefficients)

    def low(self, name: str) -> LowRank:
        stacked = (self.basis.float() @ self.coefficients[name].float()[..., None]).squeeze(-1)
        B, A = stacked.split([self.site.shape[-2], self.site.shape[-1]])
        return LowRank(B, A.mT.contiguous())

    def fits(self, low: LowRank) -> bool:
        return low.shape == self.site.shape and low.rank <= self.basis.shape[1]

    def put(self, name: str, low: LowRank) -> None:
        first = _stacked(self.low(next(iter(self.coefficients))))
        frame = _one_gauge([first, _stacked(_padded(low, self.basis.shape[1]))])[1]
        found = torch.einsum("trp,tr->tp", self.basis.float(), frame)
        self.coefficients[name] = found.to(self.basis.dtype)

    def num_parameters(self) -> int:
        """p (r + n) for each position."""
        return self.basis.numel() + sum(c.numel() for c in self.coefficients.values())

    def stored(self, coded: list[Coded]) -> dict[str, Tensor]:
        return {"basis": self.basis} | {OF + n: c for n, c in self.coefficients.items()}

    @classmethod
    def read(cls, site: Site, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        basis = tensors["basis"]
        found = {n.removeprefix(OF): t for n, t in tensors.items() if n.startswith(OF)}
        fits = basis.dim() == 3 and len(basis) == sum(site.shape)
        if not fits or any(c.shape != (len(basis), basis.shape[2]) for c in found.values()):
            raise FormatError(f"the basis or the coefficients at {site.path!r} have another shape.")
        return cls(site, basis, found)


@torch.no_grad()
def make_bank(
    adapters: Sequence[Given], size: int = 2, *, dtype: torch.dtype = torch.float32
) -> Bank:
    """A bank of adapters of one base, of `size` basis vectors a position (p).

    Args:
        adapters: of any methods that are linear in their input and change no biases; `Adapter`s or
            paths, with different names. Ranks may differ (the smaller are padded).
        size: p, from 1; from min(rank, number of adapters) on every one comes back exactly.
        dtype: of what is stored; half precision halves the file.
    """
    if size < 1:
        raise PlaitError(f"a bank's size is at least 1, not {size}.")
    parts = parts_of(adapters)
    shelves: dict[str, Shelf] = {
        path: _shelve(site, [p for p in parts if path in p.lows], size, dtype)
        for path, site in sites_of(parts).items()
    }
    return Bank.filled(shelves, parts)


def _shelve(
    site: Site, here: Sequence[AdapterChanges], size: int, dtype: torch.dtype
) -> PositionShelf:
    rank = max(1, *(part.lows[site.path].rank for part in here))
    frames = _one_gauge([_stacked(_padded(part.lows[site.path], rank)) for part in here])
    X = torch.stack(frames, -1)  # [out + in, r, n]
    basis = torch.linalg.svd(X, full_matrices=False)[0][..., :size]
    coefficients = basis.mT @ X
    kept = {p.name: coefficients[..., i].to(dtype) for i, p in enumerate(here)}
    return PositionShelf(site, basis.to(dtype), kept)


def _padded(low: LowRank, rank: int) -> LowRank:
    """Balanced, in float32, with components of zeros up to `rank`."""
    even = low.to(dtype=torch.float32).balanced()
    missing = rank - even.rank
    B = torch.nn.functional.pad(even.B, (0, missing))
    return LowRank(B, torch.nn.functional.pad(even.A, (0, 0, 0, missing)))


def _stacked(low: LowRank) -> Tensor:
    """[out + in, r]: rows of B above columns of A; a rotation of the components turns both."""
    return torch.cat([low.B * low.scale, low.A.mT])


def _one_gauge(frames: list[Tensor]) -> list[Tensor]:
    """Each pair turned by the rotation of its components that takes it nearest to the first's."""
    turned = frames[:1]
    for frame in frames[1:]:
        U, _, Vh = torch.linalg.svd(frame.mT.double() @ turned[0].double())
        turned.append((frame.double() @ (U @ Vh)).float())
    return turned
