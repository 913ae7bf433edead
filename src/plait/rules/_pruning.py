"""Which triplets stay under a budget that all sites share, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Run
from plait.errors import PlaitError
from plait.linalg import best_components
from plait.rules._sensitivity import EntryScores
from plait.rules._triplets import TripletDelta

Chosen = dict[str, Tensor]
"""{"adapter/site path": which of its triplets stay, [r] of booleans}."""


class Triplets:
    """The triplets of a run's adapters, by "adapter/site path", with their scores."""

    def __init__(self, run: Run, scores: EntryScores) -> None:
        self.run, self.scores = run, scores
        self.deltas = find_triplets(run)

    def observe(self) -> None:
        """Score the gradients of this step."""
        for name, delta in self.deltas.items():
            self.scores.observe(name, dict(delta.named_parameters()))

    def choose(self, budget: int) -> Chosen:
        """The `budget` best of all; equal ones in the order of the sites."""
        found = {}
        for name, delta in self.deltas.items():
            scores = self.scores.along(name, delta.rank_axes())
            found[name] = torch.zeros(delta.rank) if scores is None else scores.float().cpu()
        return best_components(found, budget)

    @torch.no_grad()
    def mask(self, chosen: Mapping[str, Tensor]) -> None:
        """Set e to 0 outside; what was set to 0 still trains."""
        for name, best in chosen.items():
            e = self.deltas[name].e
            e.masked_fill_(~best.to(e.device), 0.0)

    def drop(self, chosen: Mapping[str, Tensor], optimizer: Any) -> None:
        """Remove what is outside, from the adapter, the optimiser's state and the scores."""
        for name, best in chosen.items():
            delta, index = self.deltas[name], best.nonzero()[:, 0]
            if len(index) < delta.rank:
                self.scores.keep(name, index, delta.rank_axes())
                delta.keep(index, optimizer)


def find_triplets(run: Run) -> dict[str, TripletDelta]:
    """{"adapter/site path": delta}; PlaitError where there are none."""
    found = run.deltas(TripletDelta)
    if not found:
        raise PlaitError("rule Adalora drops the triplets of method adalora; attach that.")
    return found
