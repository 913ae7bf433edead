"""Arcee Fusion: of every change, the entries that stand out where they shift a row's distribution.

    importance = |dW| * KL(softmax(W0 + dW) || softmax(W0)), the divergence a row
    dW = sum_i w_i m_i dW_i,   m_i = [ importance_i >= median + factor * (Q3 - Q1) ]

One input with weight 1 is the original: a model fused into its base, nothing else of which changes
(the other model of two is then the base). Several inputs are fused into the base one by one and
summed. The quartiles are exact, of every entry of the tensor, interpolated as usual. A shift of a
whole row by one number changes no softmax and so is never important; an input that changes nothing
adds nothing. Adapters: masks are of entries, so this works in space `delta` alone, reads W0, and
the result is of full rank until it is cut; turning factors changes nothing, as dW is all it sees.
Source: the method of that name in Arcee AI's mergekit, 2024. Departure: its quartiles are of a
random sample where a tensor has more than a million entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.linalg import kth_magnitudes
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod
from plait.merging.methods._trim import IN_MEMORY


@dataclass
class ArceeFusion(Merge):
    factor: float = 1.5
    """Distances between the quartiles that an entry lies above the median (original: 1.5); a
    negative one keeps more."""
    scale: float = 1.0
    """Factor on the result."""

    spaces = ("delta",)
    reads_base = True

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        """The least importance that is kept, [k, 1, 1] in float32."""

        def blocks() -> Iterator[Tensor]:
            for rows in changes.ranges():
                yield importance(changes.rows(rows), changes.base_weight(rows))

        low, middle, high = quartiles(blocks, changes.k, math.prod(changes.shape))
        return (middle + self.factor * (high - low)).float()[:, None, None]

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        kept = importance(block, changes.base_weight(rows)) >= found
        return self.scale * (weights * block * kept).sum(0)


def importance(block: Tensor, W: Tensor) -> Tensor:
    """[k, rows, in] in float32 of changes [k, rows, in] to W [rows, in].

    With q = softmax(W) and e = dW - E_q dW the divergence is E_q[e exp e] / z - log z, z = E_q
    exp e: centred like this a small change keeps the digits that two log-softmaxes would cancel.
    """
    q = W.double().softmax(-1)
    e = block.double()
    e = e - (q * e).sum(-1, keepdim=True)
    grown = (q * torch.expm1(e)).sum(-1, keepdim=True)
    divergence = (q * e * e.exp()).sum(-1, keepdim=True) / (1 + grown) - grown.log1p()
    # Thresholds are found in float32, so entries are compared with them in float32.
    return (block.double().abs() * divergence.clamp_min(0)).float()


def quartiles(blocks: Any, k: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q1, median and Q3 [k] of `count` entries a tensor, interpolated between two of them."""
    if k * count <= IN_MEMORY:
        import numpy as np

        flat = torch.cat(list(blocks()), 1).flatten(1).numpy()
        found = np.quantile(flat.astype(np.float64), (0.25, 0.5, 0.75), axis=1)
        low, middle, high = torch.from_numpy(found)
        return low, middle, high
    made = []
    for share in (0.25, 0.5, 0.75):
        place = share * (count - 1)
        below, above = math.floor(place), math.ceil(place)
        one, two = (kth_magnitudes(blocks, [count - at] * k).double() for at in (below, above))
        made.append(one + (place - below) * (two - one))
    return made[0], made[1], made[2]


METHOD = MergeMethod(
    name="arcee-fusion",
    title="Arcee Fusion: entries that stand out in what they do to a row's softmax",
    paper="Arcee AI, mergekit, 2024",
    merge=ArceeFusion,
    whole={"factor": -1e6},
)
