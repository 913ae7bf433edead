"""TSV-Merge: the inputs' singular vectors made orthonormal together, then summed.

    dW_i = U_i S_i V_i^T, the leading triplets       U* = polar([U_1 .. U_k]), V* likewise
    dW = scale * U* diag(k w_1 S_1, .., k w_k S_k) V*^T

Inputs that share directions no longer add up in them: k copies (at weights 1 / k, the paper's form)
return one, inputs with nothing in common their sum. On factors: U_i from the small problems of each
adapter, polar factors from the R x R Gram matrix, R the sum of the ranks; the answer is of rank R,
and does not depend on null-space vectors, as that of dense code on adapters does.
Paper: Gargiulo et al., 2024, arXiv 2412.00081. Departures: the polar factor is damped (see
`damping`); inputs are cut to shorter side / k only where their ranks exceed the shorter side in
sum; biases and norms take the weighted mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import MergeMethod
from plait.merging.methods._spectral import SpectralMerge, assembled, triplets


@dataclass
class Tsv(SpectralMerge):
    kept: int | None = None
    """Leading triplets taken of each input (paper: shorter side / k); None takes all that fit."""
    damping: float = 1e-3
    """Squared singular values of the joint frames from which directions count as apart: 0 is the
    paper's polar factor, which blows up the noise between inputs that are nearly alike."""
    scale: float = 1.0
    """Factor on the result (paper: 1)."""

    def __post_init__(self) -> None:
        if self.kept is not None and self.kept < 1:
            raise PlaitError(f"tsv: kept is a number of triplets from 1, not {self.kept}.")

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        parts, k = [triplets(low) for low in lows], len(lows)
        limit, shorter = self.kept, min(changes.shape)
        if limit is None and sum(len(S) for _, S, _ in parts) > shorter:
            limit = max(1, shorter // k)
        scaled = [
            (U[:, :limit], S[:limit] * (self.scale * k * w), V[:, :limit])
            for (U, S, V), w in zip(parts, weights, strict=True)
        ]
        return assembled(scaled, self.damping, changes.dtype)


METHOD = MergeMethod(
    name="tsv",
    title="TSV: singular vectors made orthonormal together",
    paper="Gargiulo et al., 2024, arXiv 2412.00081",
    merge=Tsv,
)
