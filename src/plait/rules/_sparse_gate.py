"""A pair behind a trained gate: dW = scaling * B diag(g) A, whose gates may close to exactly 0.

    x ──► A [r, in] ──► * g [r] ──► B [out, r] ──► * scaling ──► + W x

`shrunk` is the proximal step that closes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plait.adapter import Pair, PairDelta, PairOptions, Run, Site, Traits
from plait.errors import PlaitError
from plait.linalg import LowRank


@dataclass(frozen=True)
class SparseGateOptions(PairOptions):
    rank: int = 8
    """Components at the start, of which training closes some (paper: 8, up to 32)."""


class SparseGateDelta(PairDelta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True)
    optional = frozenset()
    options: SparseGateOptions
    g: Tensor

    def build(self) -> None:
        super().build()
        self.parameter("g", self.options.rank)

    def reset(self) -> None:
        super().reset()
        self.start("g", "normal")

    def trained(self) -> LowRank:
        return LowRank(B=self.B, A=self.g[:, None] * self.A, scale=self.scaling)

    def pairs(self) -> list[Pair]:
        return []  # dW is not scaling * B A, which is what rules over pairs assume

    def rank_axes(self) -> dict[str, int]:
        return {"A": 0, "B": 1, "g": 0}

    def component_norms(self) -> Tensor:
        """|scaling g_k| ||B_k|| ||A_k|| [r], the size of each component's part of dW."""
        low = self.trained()
        return abs(low.scale) * torch.linalg.vector_norm(low.B, dim=0) * low.A.norm(dim=1)

    def _fresh_components(self, name: str, axis: int, extra: int) -> Tensor:
        fresh = super()._fresh_components(name, axis, extra)
        # Behind a shut gate and a B of 0 nothing could ever move.
        return fresh + 1 if name == "g" else fresh


def sparse_gate_count(site: Site, o: SparseGateOptions) -> int:
    return o.rank * (site.in_features + site.out_features + 1)


def shrunk(u: Tensor, tau: Tensor | float, legacy: bool = False) -> Tensor:
    """sign(u) max(|u| - tau, 0): the proximal step of tau |u|_1, for tau >= 0.

    `legacy` gives what the authors' code computes: their three masks act one after another, so
    that what lies between tau and 2 tau is first shifted below tau and then set to 0 as well.
    """
    moved = u - torch.clamp(u, -tau, tau)  # type: ignore[arg-type]
    return torch.where(moved.abs() < tau, 0, moved) if legacy else moved


def find_gates(run: Run) -> dict[str, SparseGateDelta]:
    """{"adapter/site path": delta} of those with gates; PlaitError where there are none."""
    found = run.deltas(SparseGateDelta)
    if not found:
        raise PlaitError("rule Sora closes the gates of sora's deltas; attach method sora.")
    return found
