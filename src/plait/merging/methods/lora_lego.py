"""LoRA-LEGO: the inputs' rank-1 components pooled and clustered, a centroid for each new rank.

    unit j of input i:  sqrt(s) [u ; v], a singular triplet of dW_i [out + in]
    k-means over all units, `clusters` of them          B' A' = sum of centroids' u v^T

Similar components of several adapters become one; those that only one has stay. The rank of the
result is free, and one adapter alone is compressed the same way. Two corrections: a centroid gets
its members' mean length back (averaging shortens it), and the whole sqrt(r / clusters).
k-means sees factors, but a function does not: units come from each adapter's singular form, and
signs are chosen so that similar units point alike, so turning factors changes nothing. Distances
come from the R x R Gram matrix of the units. A weight w counts as a unit k w times as large.
Paper: Zhao et al., 2024, arXiv 2409.16167. Departure: singular units, not those of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank, key_of
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod
from plait.merging.methods._clusters import centroids, kernel_means
from plait.merging.methods._spectral import triplets


@dataclass
class LoraLego(Merge):
    clusters: int | None = None
    """Rank of the result, from 1 to the ranks' sum; None takes the greatest rank of an input."""
    reweight: bool = True
    """Give centroids their members' mean length (paper: on)."""
    rescale: bool = True
    """Multiply by sqrt(mean rank of the inputs / clusters) (paper: on)."""
    restarts: int = 10
    """Starts of k-means, of which the best counts."""
    steps: int = 100
    """Of k-means, at most."""

    def __post_init__(self) -> None:
        if self.clusters is not None and self.clusters < 1:
            raise PlaitError(f"lora-lego: clusters is a rank from 1, not {self.clusters}.")

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        found = [(triplets(low), w) for low, w in zip(lows, weights, strict=True) if w]
        found = [(part, w) for part, w in found if len(part[1])]
        if not found:
            return LowRank(lows[0].B[:, :0], lows[0].A[:0])
        ranks = [len(S) for (_, S, _), _ in found]
        U = torch.cat([u * s.sqrt() * (1 if w > 0 else -1) for (u, s, _), w in found], 1).mT
        V = torch.cat([v * s.sqrt() for (_, s, v), _ in found], 1).mT
        mass = torch.cat([S.new_full((len(S),), abs(w)) for (_, S, _), w in found])
        sign = _alike(U, V)
        U, V = U * sign, V * sign
        clusters = min(max(ranks) if self.clusters is None else self.clusters, len(U))
        seed = key_of(changes.seed, changes.path, "lora-lego")
        gram = U @ U.mT + V @ V.mT
        label = kernel_means(gram, mass, clusters, self.restarts, self.steps, seed)
        shares = centroids(label, mass, clusters)
        member = torch.nn.functional.one_hot(label, clusters).mT.to(mass)
        size = len(lows) * (member @ mass) / member.sum(1)
        if self.reweight:
            size = size * _lengths(gram, shares, member).square()
        if self.rescale:
            size = size * (sum(ranks) / len(ranks) / clusters) ** 0.5
        return LowRank((shares @ U).mT * size, shares @ V).to(dtype=changes.dtype)


def _alike(U: Tensor, V: Tensor) -> Tensor:
    """Signs [R, 1] by which similar units point alike.

    Along the tree of the greatest cosines (Prim's), so that no sign hangs on units that have
    nothing in common, as those of one adapter.
    """
    gram = U @ U.mT + V @ V.mT
    length = gram.diagonal().sqrt()
    cosine = gram / (length[:, None] * length)
    sign = torch.zeros(len(U), dtype=U.dtype)
    sign[int(length.argmax())] = 1.0
    for _ in range(len(U) - 1):
        edges = torch.where((sign != 0)[:, None] & (sign == 0), cosine.abs(), -1.0)
        known, new = divmod(int(edges.argmax()), len(U))
        sign[new] = sign[known] * (1.0 if cosine[known, new] >= 0 else -1.0)
    return sign[:, None]


def _lengths(gram: Tensor, shares: Tensor, member: Tensor) -> Tensor:
    """Members' mean length over their centroid's, [clusters], at most the number of members."""
    mean = shares @ gram.diagonal().sqrt()
    own = ((shares @ gram) * shares).sum(1).clamp_min(0).sqrt()
    ratio = torch.where(own > 0, mean / torch.where(own > 0, own, 1), 1)
    return torch.minimum(ratio, member.sum(1))


METHOD = MergeMethod(
    name="lora-lego",
    title="LoRA-LEGO: rank-1 components clustered, one rank a cluster",
    paper="Zhao et al., 2024, arXiv 2409.16167",
    merge=LoraLego,
    symmetric=False,
)
