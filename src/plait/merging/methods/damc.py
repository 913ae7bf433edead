"""DAMC: models of several modalities made one; what belongs to one of them stays whole.

    shared site            dW = sum_i w_i dW_i                     language model, changed by all
    one modality's site    dW = W dW_i,  W = sum of the w          encoder, projector: only i acts
    decoupled site         dW = W sum_i dW_i                       `decoupled` names its path

Averaging an audio projector with the zeros of models that have none would only weaken it: a site
where one input acts alone is that input's. NaiveMC is this alone. DAMC also trains each model with
parameters for its modality's tokens apart from those for text, and averages only the latter:
`decoupled` names such sites, where every input's change stays as it is beside the others'. Its
adaptive adjustment is the weights, one for each input (or {site path: weight}).
Exact, by concatenating factors. Paper: Chen et al., 2024, arXiv 2402.12750. Departure: which tokens
a decoupled change acts on is not a merge's to say; one that sees other tokens too needs an adapter
of its own beside the merged one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.adapter.build import site_matches
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod


@dataclass
class Damc(Merge):
    decoupled: Sequence[str] = ()
    """Patterns of sites (a path, its ending, or a regular expression of its ending) at which each
    input's change stays whole."""

    spaces = ("factors", "delta")

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        acting = [low.rank > 0 and float(low.norm()) > 0 for low in lows]
        return LowRank.weighted_sum(lows, self._factors(changes.path, weights, acting))

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        acting = [bool(changes.whole(i).any()) for i in range(changes.k)]
        factors = self._factors(changes.path, weights.flatten().double().tolist(), acting)
        return torch.tensor(factors, dtype=weights.dtype)[:, None, None]

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        return (found * block).sum(0)

    def _factors(
        self, path: str, weights: Sequence[float], acting: Sequence[bool]
    ) -> Sequence[float]:
        site = path.removesuffix(".bias")
        if sum(acting) == 1 or any(site_matches(pattern, site) for pattern in self.decoupled):
            return [sum(weights)] * len(weights)
        return weights


METHOD = MergeMethod(
    name="damc",
    title="DAMC: modalities composed, each one's own parts kept whole",
    paper="Chen et al., 2024, arXiv 2402.12750",
    merge=Damc,
)
