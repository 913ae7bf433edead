"""K-LoRA: at every site one of two adapters, whole: the one whose largest entries weigh more.

    S_i = sum of the K largest |w_i dW_i|, K = r_1 r_2      T_i = sum of all of them
    first input (content) where S_1 / T_1 > s S_2 / T_2, else the second (style)
    s = alpha p + beta       p in [0, 1]: how far the sampling of an image is

No training, and nothing is mixed: content early, style late. The sums are found once, from blocks
of rows. `moment` is the p of this merge; a schedule is one merge for each step that differs.
The weights compare; the chosen change is multiplied by their sum.
Paper: K-LoRA, Ouyang et al., 2025, arXiv 2502.18461. Departure: the scales of the two adapters are
balanced site by site, by T_1 / T_2, not by a mean over sites without outliers. Biases go with the
site's own rule, on their entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod


@dataclass
class KLora(Merge):
    moment: float = 0.5
    """p: 0 at the first step of sampling, 1 at the last."""
    alpha: float = 1.5
    """How much the style gains on the way (paper: 1.5)."""
    beta: float = 0.5
    """The style's factor at the start (paper: 0.5)."""
    largest: int | None = None
    """K; None takes the product of the ranks (paper), or the root of the size of full matrices."""

    spaces = ("factors", "delta")

    def __post_init__(self) -> None:
        if not 0 <= self.moment <= 1:
            raise PlaitError(f"k-lora: moment is a share in [0, 1], not {self.moment}.")
        if self.largest is not None and self.largest < 1:
            raise PlaitError(f"k-lora: largest is a number of entries from 1, not {self.largest}.")

    def survey(self, changes: Changes, weights: Tensor) -> Any:
        """Which input the site takes: 0 or 1."""
        if changes.k != 2:
            raise PlaitError(f"k-lora: give two inputs, not {changes.k}.")
        size = math.prod(changes.shape)
        count = self.largest or round(size**0.5)
        if self.largest is None and changes.lows is not None:
            # Of the rank that is there: what the factors hold besides changes nothing.
            ranks = [low.truncate(energy=1.0)[0].rank for low in changes.lows]
            count = max(1, math.prod(ranks))
        count = min(count, size)
        total = torch.zeros(2, dtype=torch.float64)
        top = torch.zeros(2, 0, dtype=changes.dtype)
        for block in changes.blocks():
            entries = (weights * block).abs().flatten(1)
            total += entries.double().sum(1)
            seen = torch.cat([top, entries], 1)
            top = seen.topk(min(count, seen.shape[1])).values
        share = top.double().sum(1) / total.clamp_min(1e-300)
        style = self.alpha * self.moment + self.beta
        return 0 if float(share[0]) > style * float(share[1]) else 1

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        w = torch.tensor(list(weights), dtype=changes.dtype)[:, None, None]
        return lows[self.survey(changes, w)] * sum(weights)

    def combine(
        self, block: Tensor, rows: range, weights: Tensor, changes: Changes, found: Any
    ) -> Tensor:
        return weights.sum() * block[found]


METHOD = MergeMethod(
    name="k-lora",
    title="K-LoRA: one of two adapters at each site, by its largest entries",
    paper="Ouyang et al., 2025, arXiv 2502.18461",
    merge=KLora,
    symmetric=False,
    inputs=2,
)
