"""A pair whose rank components have gates: active ones, and a reserve that trains in advance.

    dW = scaling * B diag(e, g .. g) A        e [rank]: gates of the active components, trained
                                              g: the reserve's gate, fixed and tiny

A and B hold `rank + reserve` components. Growing turns reserve into active components and refills
it, so that a component is trained before it counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Pair, PairDelta, PairOptions, Site, Traits, replace_parameter
from plait.errors import PlaitError
from plait.linalg import LowRank


@dataclass(frozen=True)
class GatedOptions(PairOptions):
    rank: int = 1
    """Active components at the start."""
    reserve: int = 4
    """Components trained in advance, and how many a growing site gains (paper: target rank / 2)."""
    gate: float = 1e-5
    """Gate of the reserve; 0 leaves it untrained until it is chosen."""
    std: float = 0.02
    """Standard deviation of new rows of A and columns of B."""
    rescale: bool = False
    """Divide by the current rank, as IncreLoRA's paper does, instead of the initial one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or self.reserve < 0:
            raise PlaitError("rank must be at least 1 and reserve at least 0.")


class GatedDelta(PairDelta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True)
    options: GatedOptions
    e: Tensor

    def build(self) -> None:
        width = self.options.rank + self.options.reserve
        self.parameter("A", width, self.site.in_features)
        self.parameter("B", self.site.out_features, width)
        self.parameter("e", self.options.rank)

    def reset(self) -> None:
        with torch.no_grad():
            for name in ("A", "B"):
                self.start(name, "normal")
                self.get_parameter(name).mul_(self.options.std)
            if self.options.gate:
                self.B[:, self.rank :] = 0.0

    @property
    def rank(self) -> int:
        return self.e.shape[0]

    @property
    def reserve(self) -> int:
        return self.A.shape[0] - self.e.shape[0]

    def gates(self) -> Tensor:
        return torch.cat([self.e, self.e.new_full((self.reserve,), self.options.gate)])

    def trained(self) -> LowRank:
        return LowRank(B=self.B, A=self.gates()[:, None] * self.A, scale=self.scaling)

    def pairs(self) -> list[Pair]:
        return []  # gated: dW is no longer scaling * B A, which is what rules over pairs assume

    def grow(self, extra: int, optimizer: Any = None) -> None:
        """Turn `extra` components of the reserve active and refill it; dW hardly moves."""
        if extra > self.reserve:
            raise PlaitError(f"{self.site.path!r} has {self.reserve} in reserve, not {extra}.")
        kept = torch.arange(self.rank + self.reserve)
        gates = self.e.new_full((extra,), self.options.gate)
        self._replace(kept, extra, torch.arange(self.rank), gates, optimizer)

    def keep(self, components: Sequence[int] | Tensor, optimizer: Any = None) -> None:
        """Keep only these active components, and the reserve."""
        active = torch.as_tensor(components, dtype=torch.long)
        kept = torch.cat([active, torch.arange(self.rank, self.rank + self.reserve)])
        self._replace(kept, 0, active, self.e.new_zeros(0), optimizer)

    def drop_reserve(self, optimizer: Any = None) -> None:
        """End of growth: only the active components are left."""
        active = torch.arange(self.rank)
        self._replace(active, 0, active, self.e.new_zeros(0), optimizer)

    def _replace(
        self, kept: Tensor, fresh: int, gates_kept: Tensor, gates: Tensor, optimizer: Any
    ) -> None:
        scaling, rescale = self.scaling, self.options.rescale
        for name, axis in (("A", 0), ("B", 1)):
            replace_parameter(self, name, kept, axis, self._fresh(name, axis, fresh), optimizer)
        replace_parameter(self, "e", gates_kept, 0, gates, optimizer)
        root = math.sqrt if self.options.rslora else float
        # alpha follows the rank unless rescaling is wanted: the scaling, and dW, stay as they were.
        alpha = scaling * root(self.options.rank if rescale else self.rank)
        self.options = dataclasses.replace(
            self.options, rank=self.rank, reserve=self.reserve, alpha=alpha
        )

    def _fresh(self, name: str, axis: int, count: int) -> Tensor:
        old = self.get_parameter(name)
        shape = list(old.shape)
        shape[axis] = count
        # Behind a shut gate B must be random: with B and e both 0 a component could never move.
        if name == "B" and self.options.gate:
            return old.new_zeros(shape)
        # Named by the width, so that a resumed run draws what the uninterrupted one would have.
        g = self.generator("grow", name, str(old.shape[axis]))
        return (torch.empty(shape).normal_(generator=g) * self.options.std).to(old)

    def described_options(self) -> dict[str, Any]:
        return dataclasses.asdict(self.options)


def gated_count(site: Site, o: GatedOptions) -> int:
    return (o.rank + o.reserve) * (site.in_features + site.out_features) + o.rank
