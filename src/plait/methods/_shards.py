"""Pools of shards that layers of one kind draw from: who shares which, and who draws what.

Sites share a pool when their last names and shapes agree. A pool holds, for L layers, the shards of
(e - e_p) L public vectors and then of e_p private ones for each layer:

    | public: drawn by every layer | private of layer 0 | private of layer 1 | ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.adapter import Site


@dataclass(frozen=True)
class Place:
    """A site's position among the layers that share its pools."""

    pool: str
    index: int
    layers: int

    def draw(self, pools: tuple[int, int, int], rank: int, generator: torch.Generator) -> Tensor:
        """The shards [rank l] of this layer's vectors, public ones first, none twice.

        `pools` is (e, e_p, l): vectors a layer has of its own on average, how many of them no other
        layer uses, and shards in a vector.
        """
        e, private, shards = pools
        public = (e - private) * self.layers * shards
        order = torch.randperm(public, generator=generator)
        first = public + self.index * private * shards
        own = torch.arange(first, first + private * shards)
        return torch.cat([order[: (rank - private) * shards], own])


def places(sites: Sequence[Site]) -> dict[str, Place]:
    """{path: place} of all sites of an adapter, in their order."""
    kinds: dict[str, list[str]] = {}
    for site in sites:
        name = f"{site.path.rpartition('.')[2]}_{site.out_features}x{site.in_features}"
        kinds.setdefault(name, []).append(site.path)
    return {
        path: Place(name, index, len(paths))
        for name, paths in kinds.items()
        for index, path in enumerate(paths)
    }


def padded(size: int, shards: int) -> int:
    """`size` rounded up to what `shards` equal parts can hold."""
    return -(-size // shards) * shards
