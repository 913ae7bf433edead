"""`squeeze`: a finished adapter at lower ranks, by the best approximation of its change.

    s B A = U S V^T  (QR of both factors, SVD of the r x r core)
    B' = U_k S_k^(1/2)     A' = S_k^(1/2) V_k^T

dW itself is never formed. What is lost at a site is exactly the energy of the singular values left
out. With the inputs' second moment G = X^T X / N at hand, the loss in the site's *output* is
counted instead: ||(dW - dW') G^(1/2)||, whose best dW' of rank k is U_k U_k^T dW with U from the
SVD of dW G^(1/2) (nothing is inverted, so a singular G is fine). This is post-squeeze of LoRA-
Squeeze; the rule `lora-squeeze` does the same while training goes on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from plait.adapter import Adapter
from plait.compression.changes import Given, take_apart
from plait.compression.ranks import check_cut, choose_ranks
from plait.errors import PlaitError
from plait.linalg import LowRank


@torch.no_grad()
def squeeze(
    adapter: Given,
    rank: int | None = None,
    *,
    energy: float | None = None,
    budget: int | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    name: str | None = None,
) -> Adapter:
    """A plain LoRA (scaling 1, attached to nothing) close to `adapter`, of lower ranks.

    Args:
        adapter: of any method that is linear in its input; an `Adapter` or a path.
        rank, energy, budget: one of them. `rank`: at most this one everywhere; `energy`: at each
            site the fewest components with this share; `budget`: this many numbers in all factors,
            spent where they hold most.
        inputs: {path: second moment [in, in] of the site's inputs, or its diagonal [in]}, as
            `plait.statistics.activation_pass` with `SecondMoment()` measures it; sites without one
            count every direction alike.
        name: the result's; None keeps the adapter's.

    `result.info["dropped_energy"]` says per site which share of the squared norm is gone (as the
    outputs see it, where `inputs` knows them). Changes of biases, replaced modules and parameters
    come along unchanged. Paper: LoRA-Squeeze, post-tuning form. Departure: exact QR and SVD of the
    factors instead of a sketch, since that costs no more.
    """
    check_cut(rank, energy, budget)
    parts = take_apart(adapter)
    cuts = {path: _Cut(low, (inputs or {}).get(path), path) for path, low in parts.lows.items()}
    spectra = {path: cut.spectrum for path, cut in cuts.items()}
    totals = {path: float(S.double().square().sum()) for path, S in spectra.items()}
    prices = {path: cut.price for path, cut in cuts.items()}
    kept = choose_ranks(spectra, totals, prices, rank=rank, energy=energy, budget=budget)
    result = parts.rebuilt({path: cut.at(kept[path]) for path, cut in cuts.items()}, name)
    result.info["dropped_energy"] = {
        path: _lost(spectra[path], kept[path], totals[path]) for path in cuts
    }
    return result


class _Cut:
    """One site's decomposition, from which any rank can be taken."""

    def __init__(self, low: LowRank, moment: Tensor | None, path: str) -> None:
        self.low = low
        self.price = low.shape.numel() // (low.shape[-1] * low.shape[-2]) * sum(low.shape[-2:])
        self.weighted = moment is not None
        seen = low if moment is None else _as_seen(low, moment, path)
        self.U, S, self.Vh = seen.svd()
        noise = S[..., :1] * torch.finfo(S.dtype).eps * max(low.shape[-2:])
        self.S = torch.where(noise < S, S, 0)
        # Stacked matrices share one rank: their components are weighed together.
        self.spectrum = self.S.reshape(-1, S.shape[-1]).square().sum(0).sqrt()

    def at(self, rank: int) -> LowRank:
        rank = min(rank, int((self.spectrum > 0).sum()))
        U = self.U[..., :rank]
        if not self.weighted:
            return LowRank.from_svd(U, self.S[..., :rank], self.Vh[..., :rank, :], self.low.dtype)
        A = (U.mT @ self.low.B.to(U) * self.low.scale) @ self.low.A.to(U)
        return LowRank(U, A).balanced().to(dtype=self.low.dtype)


def _as_seen(low: LowRank, moment: Tensor, path: str) -> LowRank:
    """dW G^(1/2): the change as its outputs see it."""
    width = low.shape[-1]
    if tuple(moment.shape) not in ((width,), (width, width)):
        raise PlaitError(
            f"inputs at {path!r} have the shape {list(moment.shape)}; give the second moment "
            f"[{width}, {width}], or its diagonal [{width}]."
        )
    wide = moment.double()
    if wide.dim() == 1:
        A = low.A.double() * wide.clamp_min(0).sqrt()
    else:
        values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
        A = (low.A.double() @ vectors) * values.clamp_min(0).sqrt()
    return LowRank(low.B.double(), A, low.scale)


def _lost(S: Tensor, rank: int, total: float) -> float:
    return float(S[rank:].double().square().sum()) / total if total else 0.0
