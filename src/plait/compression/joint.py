"""Sharing two sides: one column space and one row space for all adapters of a site.

    dW_i ~ U C_i V^T      U [out, p], V [in, p] orthonormal, of all adapters; C_i [p, p], of one

    U, V <- leading eigenvectors of sum_i dW_i dW_i^T and sum_i dW_i^T dW_i        (HOSVD)
    U    <- leading eigenvectors of sum_i (dW_i V)(dW_i V)^T, V likewise, in turn   (ALS)
    C_i  =  U^T dW_i V, the best there is for these U and V

With p the sum of the ranks everything comes back exactly; below it, ALS never leaves more squared
error than HOSVD. All of it happens in the span of the factors, of at most as many dimensions as the
ranks add up to: no dW is formed, and as only dW counts, (B G, G^-1 A) changes nothing. In serving,
U and V are products that all adapters of a batch share, and C_i is small enough to hold thousands.
Tucker, 1966; De Lathauwer, De Moor and Vandewalle, 2000; Gabrielsson et al., "Compress then Serve",
2024, arXiv 2407.00066.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from plait.adapter import Site
from plait.adapter.formats.coded import Coded
from plait.compression.bank import Bank, parts_of, sites_of
from plait.compression.changes import AdapterChanges, Given
from plait.compression.packing import Rounded, coded_group, quantizer_for, rounded
from plait.compression.ranks import check_cut
from plait.compression.shelves import Shelf
from plait.errors import FormatError, PlaitError
from plait.linalg import LowRank, allocate

CORE = "core:"


@dataclass
class JointShelf(Shelf):
    """One site: bases U [out, p] and V [in, q], a core [p, q] and the rank of each adapter."""

    U: Tensor
    V: Tensor
    cores: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    bits: int | None = None
    codes: dict[str, Rounded] = field(default_factory=dict)
    """Of the cores, where they are stored in few bits."""

    kind = "joint"

    @property
    def names(self) -> list[str]:
        return list(self.cores)

    def low(self, name: str) -> LowRank:
        X, S, Yh = torch.linalg.svd(self.cores[name].double(), full_matrices=False)
        rank = self.ranks[name]
        pair = LowRank.from_svd(X[:, :rank], S[:rank], Yh[:rank], torch.float32)
        return LowRank(self.U.float() @ pair.B, pair.A @ self.V.float().mT)

    def fits(self, low: LowRank) -> bool:
        return low.shape == self.site.shape

    def put(self, name: str, low: LowRank) -> None:
        """C = (U^T B)(A V), rounded where the others are."""
        left = self.U.double().mT @ low.B.double()
        core = low.scale * left @ (low.A.double() @ self.V.double())
        self.ranks[name] = min(low.rank, *core.shape)
        self.cores[name] = core.to(self.U.dtype)
        if self.bits is not None and core.any():
            codes = rounded(quantizer_for(self.bits, core.shape[1]), core.float())
            self.codes[name], self.cores[name] = codes, codes.value

    def num_parameters(self) -> int:
        """p out + q in for all, p q for each."""
        return self.U.numel() + self.V.numel() + sum(c.numel() for c in self.cores.values())

    def stored(self, coded: list[Coded]) -> dict[str, Tensor]:
        found = {"U": self.U, "V": self.V}
        for name, core in self.cores.items():
            if name not in self.codes:
                found[CORE + name] = core
                continue
            codes = self.codes[name]
            own = coded_group(codes.quantizer)
            group = next((g for g in coded if _alike(g, own)), None)
            if group is None:
                coded.append(group := own)
            group.add(f"{self.site.path}:{CORE}{name}", core.shape, codes.codes, codes.scales)
        return found

    def facts(self) -> dict[str, Any]:
        return {"ranks": self.ranks} | ({} if self.bits is None else {"bits": self.bits})

    @classmethod
    def read(cls, site: Site, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        U, V = tensors["U"], tensors["V"]
        cores = {n.removeprefix(CORE): t for n, t in tensors.items() if n.startswith(CORE)}
        ranks = {name: int(facts["ranks"][name]) for name in cores}
        fits = U.dim() == V.dim() == 2 and (len(U), len(V)) == site.shape
        if not fits or any(c.shape != (U.shape[1], V.shape[1]) for c in cores.values()):
            raise FormatError(f"the bases or the cores at {site.path!r} have another shape.")
        shelf = cls(site, U, V, cores, ranks, facts.get("bits"))
        if shelf.bits is not None:  # the codes once more: rounding what was rounded changes nothing
            wide = quantizer_for(shelf.bits, V.shape[1])
            shelf.codes = {n: rounded(wide, c) for n, c in cores.items() if c.any()}
        return shelf


def _alike(one: Coded, two: Coded) -> bool:
    return (one.width, one.block, list(one.book)) == (two.width, two.block, list(two.book))


@torch.no_grad()
def joint_bank(
    adapters: Sequence[Given],
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    rounds: int = 4,
    bits: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Bank:
    """A bank of adapters of one base behind two shared bases at every site.

    Args:
        adapters: of any methods that are linear in their input and change no biases; `Adapter`s or
            paths, with different names and any ranks.
        rank, energy, budget: one of them. `rank`: p at every site (exact from the sum of the
            adapters' ranks on); `energy`: at each site the smallest p that keeps this share of all
            adapters' squared norm together; `budget`: this many numbers in all, spent on the sites
            where they keep most.
        rounds: turns of ALS after HOSVD's start; 0 is HOSVD.
        bits: store cores in 1 to 8 bits a number (which the reported errors count).
        dtype: of what else is stored.

    `bank.errors` says for each adapter and site what is lost, ||dW - dW'|| / ||dW||.
    """
    check_cut(rank, energy, budget)
    if rounds < 0 or (bits is not None and not 1 <= bits <= 8):
        raise PlaitError(f"rounds is at least 0 and bits 1 to 8, not {rounds} and {bits}.")
    parts = parts_of(adapters)
    sites = sites_of(parts)
    spans = {path: _Span([p for p in parts if path in p.lows], path) for path in sites}
    sizes = _sizes(spans, rank, energy, budget)
    shelves: dict[str, Shelf] = {}
    for path, site in sites.items():
        U, V = spans[path].bases(sizes[path], rounds)
        shelf = JointShelf(site, U.to(dtype), V.to(dtype), bits=bits)
        for part in parts:
            if path in part.lows:
                shelf.put(part.name, part.lows[path])
        shelves[path] = shelf
    return Bank.filled(shelves, parts)


class _Span:
    """One site's changes in coordinates of the spaces that their factors span, in float64."""

    def __init__(self, parts: Sequence[AdapterChanges], path: str) -> None:
        lows = [part.lows[path].to(dtype=torch.float64) for part in parts]
        self.left, b = torch.linalg.qr(torch.cat([low.B * low.scale for low in lows], 1))
        self.right, a = torch.linalg.qr(torch.cat([low.A.mT for low in lows], 1))
        ranks = [low.rank for low in lows]
        self.b, self.a = list(b.split(ranks, 1)), [x.mT for x in a.split(ranks, 1)]
        rows = [x @ y for x, y in zip(self.b, self._triangles(self.a), strict=True)]
        columns = [x.mT @ y.mT for x, y in zip(self.a, self._triangles_T(self.b), strict=True)]
        self.turn_left, self.turn_right = _leading(rows), _leading(columns)
        self.b = [self.turn_left.mT @ x for x in self.b]
        self.a = [x @ self.turn_right for x in self.a]
        self.kept = self._kept()
        self.price = len(self.left), len(self.right), len(lows)

    @staticmethod
    def _triangles(wide: Sequence[Tensor]) -> list[Tensor]:
        """R^T with R^T R = a a^T: as far as a left Gram matrix goes, a is this square matrix."""
        return [torch.linalg.qr(x.mT).R.mT for x in wide]

    @staticmethod
    def _triangles_T(tall: Sequence[Tensor]) -> list[Tensor]:
        return [torch.linalg.qr(x).R for x in tall]

    @property
    def most(self) -> int:
        return max(self.turn_left.shape[1], self.turn_right.shape[1])

    def _kept(self) -> Tensor:
        """[most + 1]: the squared norm that HOSVD keeps at each size, of all adapters together."""
        energy = sum((x @ y).square() for x, y in zip(self.b, self.a, strict=True))
        assert isinstance(energy, Tensor)
        sums = energy.cumsum(0).cumsum(1)
        index = torch.arange(self.most)
        rows, columns = (index.clamp_max(n - 1) for n in sums.shape)
        return torch.cat([sums.new_zeros(1), sums[rows, columns]])

    def cost(self, size: int) -> int:
        """Numbers stored at this size."""
        out, inside, count = self.price
        p, q = min(size, self.turn_left.shape[1]), min(size, self.turn_right.shape[1])
        return p * out + q * inside + count * p * q

    def bases(self, size: int, rounds: int) -> tuple[Tensor, Tensor]:
        """U [out, p] and V [in, q]."""
        P = torch.eye(self.turn_left.shape[1], dtype=torch.float64)[:, :size]
        Q = torch.eye(self.turn_right.shape[1], dtype=torch.float64)[:, :size]
        if 0 < size < self.most:
            for _ in range(rounds):
                P = _leading([x @ (y @ Q) for x, y in zip(self.b, self.a, strict=True)])[:, :size]
                Q = _leading([y.mT @ (x.mT @ P) for x, y in zip(self.b, self.a, strict=True)])
                Q = Q[:, :size]
        return self.left @ (self.turn_left @ P), self.right @ (self.turn_right @ Q)


def _leading(pieces: Sequence[Tensor]) -> Tensor:
    """All left singular vectors of the pieces side by side, the greatest first, as far as they
    span their space."""
    wide = torch.cat(list(pieces), 1)
    return torch.linalg.svd(wide, full_matrices=wide.shape[1] < wide.shape[0])[0]


def _sizes(
    spans: Mapping[str, _Span], rank: int | None, energy: float | None, budget: int | None
) -> dict[str, int]:
    if rank is not None:
        return {path: min(rank, span.most) for path, span in spans.items()}
    if energy is not None:
        return {path: _enough(span.kept, energy) for path, span in spans.items()}
    assert budget is not None
    worth = {path: span.kept.tolist() for path, span in spans.items()}
    price = {path: [s.cost(i) for i in range(s.most + 1)] for path, s in spans.items()}
    return allocate(worth, budget, price)


def _enough(kept: Tensor, energy: float) -> int:
    """The smallest size that keeps a share `energy`; what rounding adds at the end is not asked
    for."""
    total = float(kept[-1])
    return int((kept < energy * total * (1 - 1e-12)).sum())
