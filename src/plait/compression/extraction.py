"""`extract`: the adapter that turns a base model into its full fine-tune, as well as a rank allows.

    tuned - base = dW ──► randomised SVD ──► U_r S_r V_r^T ──► B = U S^(1/2), A = S^(1/2) V^T

Eckart and Young: no other matrix of that rank lies nearer to dW. Tensors are read one by one from
mapped files, so memory holds the largest matrix and the adapter, never two models. Matrices are
factored wherever they changed (embeddings, convolutions and packed experts too, and tied ones at
every place that reads them: Plait's format stores such a pair once, PEFT's twice, since only its
newest versions can tie adapters); norms and biases are no matrices, and are kept as they changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.adapter import Adapter, Site
from plait.adapter.build import site_matches
from plait.adapter.convert import lora_from
from plait.adapter.replacement import add_parameter
from plait.compression.ranks import check_cut, choose_ranks, enough
from plait.compression.source import places_from_source
from plait.compression.weights import (
    Places,
    Source,
    Weights,
    canonical,
    open_weights,
    pairs,
    skeleton,
    turned,
)
from plait.errors import PlaitError
from plait.linalg import LowRank, krylov_svd, randomized_svd
from plait.statistics.progress import track

Decomposition = Literal["randomized", "krylov", "exact"]
Triplets = tuple[Tensor, Tensor, Tensor]
STRETCH = 1 << 16
MOST = 128
"""Leading components of a site that a budget may choose from."""


@torch.no_grad()
def extract(
    base: Source,
    tuned: Source,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    targets: Sequence[str] | None = None,
    rest: Literal["keep", "drop"] = "keep",
    svd: Decomposition = "randomized",
    dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
    name: str = "extracted",
    seed: int = 0,
    progress: bool = False,
) -> Adapter:
    """A LoRA (scaling 1, attached to nothing) that makes `base` act like `tuned`.

    Args:
        base, tuned: checkpoint folders or files, models, or state dicts, of the same tensors.
        rank, energy, budget: one of them; 16 components at every site when none is given.
            `energy` keeps at each site the fewest with this share of its squared norm, `budget`
            this many numbers in all factors together, where they hold most (at most 128 a site).
        targets: only sites whose path ends so, or matches such a pattern; None takes all.
        rest: what becomes of changed tensors that are no matrices (norms, biases): "keep" them as
            dense changes of parameters, or "drop" them (PEFT's format has no place for them).
        svd: "randomized" (two power iterations), "krylov" (nearly exact, for flat spectra, several
            times slower) or "exact".
        dtype: of the adapter; None takes the fine-tune's own (of its first changed matrix).
        model: who says how tensors are stored and tied; None builds the structure from the base's
            config.json, and without one goes by names.

    `result.info["extract"]` holds for each site the relative error ||dW - B A|| / ||dW||, as
    measured on the stored factors, the share of the fine-tune's whole change that the adapter
    holds, and what was left out, by name with its norm. Raises PlaitError for tensors that only one
    side has, for other shapes, and where nothing changed.
    """
    if rank is None and energy is None and budget is None:
        rank = 16
    check_cut(rank, energy, budget)
    work = _Work(rank, energy, budget, svd, seed, dtype)
    with ExitStack() as stack:
        first = stack.enter_context(open_weights(base, "the base"))
        second = stack.enter_context(open_weights(tuned, "the fine-tune"))
        told = None if model is not None else places_from_source(base, first.shapes)
        places = told or Places(model or skeleton(base) or skeleton(tuned))
        todo = pairs(first, second, places)
        for mine, theirs in track(todo, "extracting") if progress else todo:
            old, new = first.read(mine), second.read(theirs)
            if old.is_floating_point() and not torch.equal(old, new):
                wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
                change = new.to(wide) - old.to(wide)
                work.take(mine, change, places.sites(mine, tuple(old.shape)), targets, new.dtype)
        if budget is not None:  # all matrices had to be seen before any could be cut
            kept = choose_ranks(work.spectra, work.totals, work.prices, **work.cut)
            for mine, found in work.found.items():
                found.truncate(kept[mine], work.dtype)
                again = partial(_changed, found, first, second, mine, dict(todo)[mine])
                found.measure(again, math.sqrt(work.totals[mine]))
    result = _adapter(work, rest, name)
    result.info["extract"] |= {"base": first.label, "tuned": second.label}
    return result


@dataclass
class _Found:
    """One changed matrix: its sites, its leading triplets, and later what is kept of them."""

    sites: list[Site]
    triplets: Triplets
    low: LowRank | None = None
    error: float = 0.0

    def truncate(self, rank: int, dtype: torch.dtype) -> None:
        U, S, Vh = self.triplets
        self.low = LowRank.from_svd(U[..., :rank], S[..., :rank], Vh[..., :rank, :], dtype)

    def measure(self, look: Callable[[], Tensor], norm: float) -> None:
        """The error of the factors as they are stored; the change that `look` gives is spent.

        They are a projection of the change, so what they leave is orthogonal to what they hold. An
        error so small that rounding would show in it is measured on the matrix instead.
        """
        assert self.low is not None
        kept = self.triplets[1][..., : self.low.rank].double().square().sum()
        left = 1 - float(kept) / norm**2
        if left > max(1e-4, 100 * torch.finfo(self.low.dtype).eps ** 2):
            self.error = math.sqrt(left)
            return
        change = look()
        B, A = (self.low.B * self.low.scale).to(change), self.low.A.to(change)
        rest = change.sub_(B @ A) if change.dim() > 2 else change.addmm_(B, A, alpha=-1)
        self.error = _norm(rest) / norm


@dataclass
class _Work:
    """What has been found so far."""

    rank: int | None
    energy: float | None
    budget: int | None
    svd: Decomposition
    seed: int
    asked: torch.dtype | None = None
    """Of the adapter; None takes that of the first changed matrix."""
    first: torch.dtype | None = None
    found: dict[str, _Found] = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    prices: dict[str, int] = field(default_factory=dict)
    vectors: dict[str, tuple[Site, Tensor]] = field(default_factory=dict)
    left_out: dict[str, float] = field(default_factory=dict)
    whole: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return self.asked or self.first or torch.float32

    @property
    def cut(self) -> dict[str, Any]:
        return {"rank": self.rank, "energy": self.energy, "budget": self.budget}

    def take(
        self,
        name: str,
        change: Tensor,
        sites: list[Site],
        targets: Sequence[str] | None,
        dtype: torch.dtype,
    ) -> None:
        """One changed tensor: factored, kept as it is, or left out."""
        norm = _norm(change)
        if not math.isfinite(norm):
            raise PlaitError(f"{name!r} holds NaN or infinity in the base or in the fine-tune.")
        self.whole += norm**2
        wanted = [s for s in sites if not targets or any(site_matches(t, s.path) for t in targets)]
        if not wanted:
            self.left_out[name] = norm
        elif len(wanted[0].shape) < 2:
            self.vectors[name] = (wanted[0], change)
        else:
            self.first = self.first or dtype
            self._factor(name, canonical(wanted[0], change), wanted, norm)

    def _factor(self, name: str, change: Tensor, sites: list[Site], norm: float) -> None:
        triplets, square = self._leading(change, norm**2), norm**2
        S = triplets[1]
        found = self.found[name] = _Found(sites, triplets)
        self.spectra[name] = S.flatten(0, -2).square().sum(0).sqrt() if S.dim() > 1 else S
        self.totals[name] = square
        packed = int(torch.Size(sites[0].shape[:-2]).numel())
        self.prices[name] = packed * sum(sites[0].shape[-2:]) * len(sites)
        if self.budget is None:
            own = {name: self.spectra[name]}, {name: square}, {name: self.prices[name]}
            found.truncate(choose_ranks(*own, **self.cut)[name], self.dtype)
            found.measure(lambda: change, norm)

    def _leading(self, M: Tensor, square: float) -> Triplets:
        """As many triplets as the cut may ask for; for a share the sketch grows until it holds."""
        shorter = min(M.shape[-2:])
        width = min(shorter, self.rank or (MOST if self.budget is not None else 16))
        while True:
            triplets = self._triplets(M, width)
            S = triplets[1].reshape(-1, width).double().square().sum(0).sqrt()
            if self.energy is None or width == shorter:
                return triplets
            if enough(S, self.energy, square) < width:
                return triplets
            width = shorter if 6 * width > shorter else 2 * width

    def _triplets(self, M: Tensor, width: int) -> Triplets:
        if self.svd == "exact":
            U, S, Vh = torch.linalg.svd(M, full_matrices=False)
            return U[..., :width], S[..., :width], Vh[..., :width, :]
        if self.svd == "krylov":
            return krylov_svd(M, width, seed=self.seed)
        return randomized_svd(M, width, seed=self.seed)


def _norm(change: Tensor) -> float:
    """Of all entries; float32 in stretches short enough that their sums keep its precision."""
    if change.dtype != torch.float32:
        return float(torch.linalg.vector_norm(change, dtype=torch.float64))
    stretches = change.reshape(-1).split(STRETCH)
    return math.sqrt(sum(float(torch.dot(piece, piece)) for piece in stretches))


def _changed(found: _Found, first: Weights, second: Weights, mine: str, theirs: str) -> Tensor:
    """The change of one matrix in canonical orientation, read once more."""
    wide = torch.promote_types(found.triplets[0].dtype, torch.float32)
    return canonical(found.sites[0], second.read(theirs).to(wide) - first.read(mine).to(wide))


def _placed(found: _Found) -> Iterator[tuple[Site, LowRank]]:
    """What each site that reads the matrix gets: a tied head sees the embedding's transpose."""
    assert found.low is not None
    if found.low.rank:
        for site in found.sites:
            same = turned(site) == turned(found.sites[0])
            yield site, found.low if same else found.low.transpose()


def _adapter(work: _Work, rest: str, name: str) -> Adapter:
    lows: dict[str, LowRank] = {}
    sites: list[Site] = []
    errors: dict[str, float] = {}
    left_out = dict(work.left_out)
    if rest == "drop":
        left_out |= {
            key: float(change.double().norm()) for key, (_, change) in work.vectors.items()
        }
        work.vectors.clear()
    lost = sum(norm**2 for norm in left_out.values())
    for key, found in work.found.items():
        lost += found.error**2 * work.totals[key]
        placed = list(_placed(found))
        for site, low in placed:
            sites.append(site)
            lows[site.path], errors[site.path] = low, found.error
        if not placed:
            left_out[key] = work.totals[key] ** 0.5
    if not lows and not work.vectors:
        raise PlaitError("the fine-tune changes nothing here that an adapter could hold.")
    result = lora_from(name, sites, lows, {}, seed=work.seed)
    for site, change in work.vectors.values():
        _keep(result, site, change)
    result.info["dropped_energy"] = {path: error**2 for path, error in errors.items()}
    result.info["extract"] = {
        **{k: v for k, v in work.cut.items() if v is not None},
        "svd": work.svd,
        "errors": errors,
        "held": 1 - lost / work.whole,
        "left_out": left_out,
        "kept_dense": sorted(work.vectors),
    }
    return result


def _keep(result: Adapter, site: Site, change: Tensor) -> None:
    """A dense change, in the precision it came in: float16 would round small ones to nothing."""
    add_parameter(result, site.path, change, None)
    delta = result.deltas[site.path]
    delta.get_parameter("change").data = change.clone()
    delta.dtype = change.dtype
