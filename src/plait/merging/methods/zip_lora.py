"""ZipLoRA: a coefficient for every input column of every adapter, so that they do not overlap.

    dW = sum_i dW_i diag(m_i)      m_i [in], from w_i each
    least  sum_i |(dW - dW_i) V_i|^2 / |dW_i|^2  +  overlap * sum_{i<j} mean |m_i * m_j|

V_i [in, r_i] spans the inputs that adapter i reads, which stand for its data: on them the merge is
to do what adapter i does alone, while columns are left to one adapter where that costs nothing.
Nesterov's steps on k * in numbers, as long as the loss's curvature allows; every product is of the
size of the factors, and the result is exact, of the ranks' sum: A_i diag(m_i). Many m do, and the
start chooses among them: weights of 1 are the paper's, which begins at the plain sum.
Paper: Shah et al., 2023, arXiv 2311.13600. Departure: without data. The paper compares the models'
outputs on the images that each adapter was trained on; V_i takes their place. Adam is not used: its
steps are of one length however small the gradient, and would turn rounding into noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod
from plait.merging.methods._spectral import triplets
from plait.merging.spaces import align


@dataclass
class ZipLora(Merge):
    overlap: float = 0.01
    """Weight of what two adapters both use of a column (paper: 0.01)."""
    steps: int = 100
    """Of the fit (paper: 100); 0 is the weighted sum."""

    def __post_init__(self) -> None:
        if self.overlap < 0 or self.steps < 0:
            raise PlaitError("zip-lora: overlap and steps are 0 or more.")

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        m = self.columns(lows, weights).to(lows[0].dtype)
        scaled = [LowRank(low.B, low.A * row, low.scale) for low, row in zip(lows, m, strict=True)]
        return LowRank.weighted_sum(scaled, [1.0] * len(scaled))

    def columns(self, lows: Sequence[LowRank], weights: Sequence[float]) -> Tensor:
        """m [k, in] in float64, after the last step."""
        wide = [low.to(dtype=torch.float64) for low in lows]
        _, coordinates = align(wide)
        C, read = torch.stack(coordinates), [triplets(low)[2] for low in wide]
        sizes = C.square().sum((1, 2))
        share = torch.where(sizes > 0, 1 / torch.where(sizes > 0, sizes, 1), 0)
        # No direction of m bends the loss more: a column's coefficients see that column alone.
        curvature = 2 * float(share.sum() * C.square().sum((0, 1)).max()) if C.numel() else 0.0
        start = torch.tensor(list(weights), dtype=torch.float64)[:, None].repeat(1, C.shape[-1])
        m, ahead = start, start
        for step in range(self.steps if curvature else 0):
            last, m = m, ahead - self._gradient(ahead, C, read, share) / curvature
            ahead = m + step / (step + 3) * (m - last)
        return m

    def _gradient(self, m: Tensor, C: Tensor, read: Sequence[Tensor], share: Tensor) -> Tensor:
        """Of the loss, [k, in], for coordinates C [k, p, in] in an orthonormal basis of outputs."""
        merged = (C * m[:, None, :]).sum(0)
        off = sum(
            2 * s * ((merged - own) @ V) @ V.mT for own, V, s in zip(C, read, share, strict=True)
        )
        sizes = m.abs()
        others = sizes.sum(0) - sizes
        return (C * off).sum(1) + self.overlap / m.shape[1] * m.sign() * others


METHOD = MergeMethod(
    name="zip-lora",
    title="ZipLoRA: a coefficient for every column, fitted to the factors",
    paper="Shah et al., 2023, arXiv 2311.13600",
    merge=ZipLora,
    whole={"overlap": 0.0},
)
