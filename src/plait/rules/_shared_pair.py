"""One trained pair of factors a shape of weight, and a vector of coefficients a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from plait.adapter import Delta, PairOptions, SharedTensors, Site, Traits
from plait.errors import PlaitError
from plait.linalg import LowRank


@dataclass(frozen=True)
class S2LoraOptions(PairOptions):
    rank: int = 32
    """Rank r of the shared pairs, and so the most that a layer can use (paper: 32 to 128)."""


def _shape(site: Site) -> str:
    return f"{site.out_features}x{site.in_features}"


class S2LoraDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True)
    options: S2LoraOptions
    c: Tensor

    @classmethod
    def prepare(cls, sites: Sequence[Site], options: S2LoraOptions, shared: SharedTensors) -> None:
        for site in sites:
            if f"A_{_shape(site)}" not in shared:
                shared.pool(f"A_{_shape(site)}", (options.rank, site.in_features), "orthogonal")
                shared.pool(f"B_{_shape(site)}", (site.out_features, options.rank), "orthogonal")

    def build(self) -> None:
        shared = len(self.pair()[0])
        if self.options.rank != shared:
            raise PlaitError(
                f"rank {self.options.rank} at {self.site.path!r} is not the {shared} of the pair "
                "that it shares with other layers; overrides= may not change it."
            )
        self.parameter("c", shared)

    def pair(self) -> tuple[Tensor, Tensor]:
        """The shared A [r, in] and B [out, r]."""
        return self.shared[f"A_{_shape(self.site)}"], self.shared[f"B_{_shape(self.site)}"]

    @property
    def effective_rank(self) -> int:
        """How many components this layer uses."""
        return int(self.c.count_nonzero())

    def factors(self) -> LowRank:
        A, B = self.pair()
        return LowRank(B=B * self.c, A=A, scale=self.options.scaling)


def s2_count(sites: Sequence[Site], o: S2LoraOptions) -> int:
    pairs = {_shape(s): s.in_features + s.out_features for s in sites}
    return o.rank * (sum(pairs.values()) + len(sites))
