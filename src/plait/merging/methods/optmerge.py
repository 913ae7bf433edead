"""OptMerge: WUDI on changes freed of noise, their leading singular directions.

    min over dW of  sum_i m_i |(dW - T_i) P_i^T|^2 / |dW_i|^2       m_i = k w_i / sum of the w

                  T_i                            P_i                 start
    lora   SVD_K(dW_i)                    SVD_K(dW_i)                mean        (low-rank tuning)
    full   mean + SVD_K(dW_i - mean)      S_K V_K^T of dW_i          sum         (full fine-tuning)

K is the shorter side of the matrix over the number of inputs. Adapters are of far lower rank as a
rule: nothing is cut then, and the `lora` variant is WUDI from the mean. Exact in factors: every
matrix here lies within the spans of the stacked factors (see `plait.merging.methods._quadratic`).
Paper: Wei et al., 2025, arXiv 2505.19892 (lora: 300 steps of SGD at 1e-4 with momentum 0.9, solver
"sgd", which stays near the mean; full: 300 of Adam at 1e-5, solver "adam"). Departure: gradient
flow for `time` is the default solver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from plait.errors import PlaitError
from plait.merging.method import MergeMethod
from plait.merging.methods._quadratic import QuadraticMerge, leading


@dataclass
class OptMerge(QuadraticMerge):
    variant: Literal["lora", "full"] = "lora"
    """For changes of low rank, or of full fine-tuning."""
    kept: int | None = None
    """K, singular directions kept of each input; None is the shorter side over the inputs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kept is not None and self.kept < 1:
            raise PlaitError(f"optmerge: kept is a number of directions from 1, not {self.kept}.")

    @property
    def from_sum(self) -> bool:
        return self.variant == "full"

    def term(self, change: Tensor, mean: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        rank = self.kept or rank
        projector = leading(change, rank)
        if self.variant == "full":
            return mean + leading(change - mean, rank), projector
        return projector, projector


METHOD = MergeMethod(
    name="optmerge",
    title="OptMerge: WUDI on each input's leading singular directions",
    paper="Wei et al., 2025, arXiv 2505.19892",
    merge=OptMerge,
)
