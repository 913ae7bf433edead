"""Merges that are a weighted sum after all, with weights found from the changes' inner products.

Whatever bends between models (spherical interpolation, means on the sphere, angle-dependent
averages) stays in the span of the changes. So a site's k x k Gram matrix <dW_i, dW_j> says it all:
in factors it costs r x r products, and the result is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import Merge


class CoefficientMerge(Merge):
    """Subclasses say `coefficients`."""

    spaces = ("factors", "delta")

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        """The factors [k] of the changes, from their inner products [k, k], float64."""
        raise NotImplementedError

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        gram = torch.stack([torch.stack([a.inner(b).double() for b in lows]) for a in lows])
        w = torch.tensor(list(weights), dtype=torch.float64)
        return LowRank.weighted_sum(lows, self.coefficients(gram, w).tolist())

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        gram = torch.zeros(changes.k, changes.k, dtype=torch.float64)
        for block in changes.blocks():
            flat = block.flatten(1).double()
            gram += flat @ flat.mT
        return self.coefficients(gram, weights.flatten().double())

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        return torch.tensordot(found.to(block.dtype), block, 1)
