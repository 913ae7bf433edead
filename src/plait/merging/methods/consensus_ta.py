"""Consensus: of the weighted sum, only the entries that enough of the inputs use.

    a_i = k w_i dW_i      a = sum_i a_i      m_i = [ |a_i| > threshold |a - a_i| ]
    dW = scale * [ sum_i m_i >= agreement ] * sum_i w_i dW_i

m_i is input i's TALL mask: entries where it is not drowned by the others. Entries that no input
uses, or only one, are noise to most tasks and are left out. Weights 1 / k are the paper's form, of
which the result is then 1 / k (its alpha). `input=i` instead keeps the entries of input i alone:
what the paper stores as one bit an entry to get a task back out of the merged model. (For adapters
those bits are more than the adapter itself unless its rank is above in / 64.)
Paper: Wang et al., 2024, arXiv 2405.07813.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod


def tall_masks(block: Tensor, weights: Tensor, threshold: float) -> Tensor:
    """m [k, rows, in] of changes [k, rows, in] with weights [k, 1, 1]."""
    own = len(block) * weights * block
    return own.abs() > threshold * (own.sum(0) - own).abs()


@dataclass
class ConsensusTa(Merge):
    threshold: float = 0.2
    """How large an entry must be beside those of all others together (paper: chosen on validation
    data from 0.2 to 0.6)."""
    agreement: int = 2
    """How many inputs must use an entry (paper: 2); 0 is the plain sum."""
    input: int | None = None
    """Only what this input (from 0) uses, whatever the others do: its own model again."""
    scale: float = 1.0
    """Factor on the result."""

    spaces = ("aligned", "delta")

    def __post_init__(self) -> None:
        if self.threshold < 0 or self.agreement < 0:
            raise PlaitError("consensus-ta: threshold and agreement are 0 or more.")

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        if self.input is not None and not 0 <= self.input < changes.k:
            raise PlaitError(
                f"consensus-ta: there is no input {self.input}; count {changes.k} inputs from 0."
            )
        return None

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        masks = tall_masks(block, weights, self.threshold)
        if self.input is None:
            kept = masks.sum(0) >= self.agreement
        else:
            kept = masks[self.input]
        return self.scale * torch.where(kept, (weights * block).sum(0), 0)


METHOD = MergeMethod(
    name="consensus-ta",
    title="Consensus: entries of the sum that several inputs use",
    paper="Wang et al., 2024, arXiv 2405.07813",
    merge=ConsensusTa,
    whole={"agreement": 0},
)
