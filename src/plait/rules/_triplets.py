"""A pair with singular values: dW = scaling * P diag(e) Q, in triplets that can be dropped.

    x ──► A = Q [r, in] ──► * e [r] ──► B = P [out, r] ──► * scaling ──► + W x

A triplet is a row of A, an entry of e and a column of B. e starts at 0, so that training starts at
the base model, and A and B are random: with B and e both 0 nothing would ever move.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plait.adapter import Pair, PairDelta, PairOptions, Site, Traits
from plait.linalg import LowRank


@dataclass(frozen=True)
class TripletOptions(PairOptions):
    rank: int = 12
    """Triplets a site at the start (paper: one and a half times the average aimed at)."""
    std: float = 0.02
    """Standard deviation of A and B at the start."""


class TripletDelta(PairDelta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True)
    optional = frozenset()
    options: TripletOptions
    e: Tensor

    def build(self) -> None:
        super().build()
        self.parameter("e", self.options.rank)

    def reset(self) -> None:
        with torch.no_grad():
            for name in ("A", "B"):
                self.start(name, "normal")
                self.get_parameter(name).mul_(self.options.std)

    def trained(self) -> LowRank:
        return LowRank(B=self.B, A=self.e[:, None] * self.A, scale=self.scaling)

    def pairs(self) -> list[Pair]:
        return []  # dW is not scaling * B A, which is what rules over pairs assume

    def rank_axes(self) -> dict[str, int]:
        return {"A": 0, "B": 1, "e": 0}

    def _fresh_components(self, name: str, axis: int, extra: int) -> Tensor:
        old = self.get_parameter(name)
        shape = list(old.shape)
        shape[axis] = extra
        if name == "e" or extra == 0:
            return old.new_zeros(shape)
        # Named by the width, so that a resumed run draws what the uninterrupted one would have.
        g = self.generator("grow", name, str(old.shape[axis]))
        return (torch.empty(shape).normal_(generator=g) * self.options.std).to(old)


def triplet_count(site: Site, o: TripletOptions) -> int:
    return o.rank * (site.in_features + site.out_features + 1)
