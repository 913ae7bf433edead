"""EMR: one unified change; masks and a scale say what of it belongs to which input.

    sigma = sign of sum_i w_i dW_i          dW = sigma max_i |dW_i| over changes of that sign
    input i:  M_i = [ dW_i sigma > 0 ]      c_i = sum |dW_i| / sum |M_i dW|      c_i M_i dW

The unified change keeps the largest of what agrees at every entry; `input=i` gives the i-th input
back, from it, a bit an entry and one number a site. Changes with disjoint supports, and copies,
come back exactly. (For adapters the bits are more than the adapter unless its rank is above
in / 64: use it there to judge, not to save.) Weights count in the election alone; a negative one
turns its change around.
Paper: EMR-Merging, Huang et al., 2024, arXiv 2405.17461.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod


def unified(block: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The unified change [rows, in] and the masks [k, rows, in] of what has its sign."""
    sign = torch.where((weights * block).sum(0) >= 0, 1.0, -1.0).to(block.dtype)
    agrees = (weights * block).sign() == sign
    return sign * torch.where(agrees, block.abs(), 0).amax(0), agrees


@dataclass
class Emr(Merge):
    input: int | None = None
    """The change of this input (from 0), rebuilt; None gives the unified one."""
    scale: float = 1.0
    """Factor on the result."""

    spaces = ("aligned", "delta")

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        """c_i of the input that is to be rebuilt."""
        if self.input is None:
            return 1.0
        if not 0 <= self.input < changes.k:
            raise PlaitError(f"emr: there is no input {self.input}; count {changes.k} from 0.")
        own = shared = 0.0
        for block in changes.blocks():
            whole, masks = unified(block, weights)
            own += float(block[self.input].abs().double().sum())
            shared += float(torch.where(masks[self.input], whole.abs(), 0).double().sum())
        return own / shared if shared else 1.0

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        whole, masks = unified(block, weights)
        if self.input is not None:
            # The mask is of the input itself; its weight only took part in the election.
            turn = weights[self.input].sign()
            whole = torch.where(masks[self.input], turn * whole, 0)
        return self.scale * found * whole


METHOD = MergeMethod(
    name="emr",
    title="EMR: one unified change, with a mask and a scale for each input",
    paper="Huang et al., 2024, arXiv 2405.17461",
    merge=Emr,
)
