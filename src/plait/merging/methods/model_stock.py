"""Model Stock: the mean of the changes, drawn to the base the more, the less they agree.

    c = mean cosine of two changes      t = k c / (1 + (k - 1) c), in [0, 1]
    dW = t * sum_i w_i dW_i

Models trained alike from one base lie on a thin shell around an unseen centre; t is where the
foot of the centre's perpendicular on the way from the base to the mean lies. Adapters of different
tasks are nearly orthogonal, and nothing of their mean is left: the method is for runs of one task.
Angles are of whole changes, or of every row (the paper's filters) or column; exact in factors.
Paper: Jang et al., 2024, arXiv 2403.19522. Departure: t is clipped to [0, 1]; the formula
falls below 0 for opposing changes and diverges at c = -1 / (k - 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from plait.errors import PlaitError
from plait.merging.method import MergeMethod
from plait.merging.methods._lines import LineMerge, cosines


@dataclass
class ModelStock(LineMerge):
    clip: bool = True
    """Keep t in [0, 1]; without it changes that oppose each other are turned round (mergekit)."""

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        k = gram.shape[-1]
        if k < 2:
            raise PlaitError("model-stock: give two inputs or more; the angles between them count.")
        cosine, _ = cosines(gram)
        pairs = cosine.sum((-2, -1)) - cosine.diagonal(dim1=-2, dim2=-1).sum(-1)
        c = pairs / (k * (k - 1))
        c = c.clamp(0, 1) if self.clip else c
        t = k * c / (1 + (k - 1) * c)
        return t[:, None] * weights


METHOD = MergeMethod(
    name="model-stock",
    title="Model Stock: a mean drawn to the base by the angles",
    paper="Jang et al., 2024, arXiv 2403.19522",
    merge=ModelStock,
)
