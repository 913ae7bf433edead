"""Linear: the weighted sum of the changes themselves.

    dW = sum_i w_i dW_i = [w_1 s_1 B_1 | ... | w_k s_k B_k] [A_1; ...; A_k]

Exact, by concatenating factors: A [sum r_i, in], B [out, sum r_i]. (Adding the As and the Bs apart,
as is often done, gives cross terms B_i A_j instead: two copies of one adapter at weight 1/2 then do
not return it.) Any weights are allowed, negative ones too (task arithmetic: forgetting).
Paper: task arithmetic, Ilharco et al., 2022, arXiv 2212.04089.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod


@dataclass
class Linear(Merge):
    scale: float = 1.0
    """Factor on the whole sum (the papers' lambda)."""

    spaces = ("factors", "delta")

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        return LowRank.weighted_sum(lows, [self.scale * w for w in weights])

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        return self.scale * (weights * block).sum(0)


METHOD = MergeMethod(
    name="linear",
    title="Linear: the exact weighted sum of the changes",
    paper="Ilharco et al., 2022, arXiv 2212.04089",
    merge=Linear,
)
