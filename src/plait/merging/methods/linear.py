"""Linear: the weighted sum of the changes themselves.

    dW = sum_i w_i dW_i = [w_1 s_1 B_1 | ... | w_k s_k B_k] [A_1; ...; A_k]

Exact, by concatenating factors: A [sum r_i, in], B [out, sum r_i]. (Adding the As and the Bs apart,
as is often done, gives cross terms B_i A_j instead: two copies of one adapter at weight 1/2 then do
not return it.) Any weights are allowed, negative ones too (task arithmetic: forgetting).
Paper: task arithmetic, Ilharco et al., 2022, arXiv 2212.04089.
"""

from __future__ import annotations

from collections.abc import Sequence

from plait.linalg import LowRank
from plait.merging.method import MergeMethod


def linear(deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """sum_i weights[i] * deltas[i], of rank sum_i r_i."""
    return LowRank.weighted_sum(deltas, weights)


METHOD = MergeMethod(
    name="linear",
    title="Linear: the exact weighted sum of the changes",
    paper="Ilharco et al., 2022, arXiv 2212.04089",
    merge=linear,
)
