"""Twin-Merging: what the inputs share, and of what each has besides, a small residual.

    shared = scale * sum_i w_i dW_i        v_i = best rank-q approximation of dW_i - shared
    dW(x) = shared + sum_i g_i(x) v_i

A router says g for each input of the model; `gates` fixes it here (one-hot for one task), and
`parts` gives the shared change and the residuals themselves, as experts for a router. With adapters
everything lies in the span of their factors: the residuals' SVDs are of the ranks' sum, not of the
matrix, and at q of that size a one-hot gate gives the adapter back exactly.
Paper: Lu et al., 2024, arXiv 2406.15479. Departure: the shared change is the weighted mean unless
`scale` says more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod


def parts(
    lows: Sequence[LowRank], weights: Sequence[float], residual: int, scale: float = 1.0
) -> tuple[LowRank, list[LowRank], list[float]]:
    """The shared change, the residual of each input, and the share of energy each one lacks."""
    shared = LowRank.weighted_sum(lows, [scale * w for w in weights])
    cut = [(low - shared).truncate(rank=residual) for low in lows]
    return shared, [low for low, _ in cut], [dropped for _, dropped in cut]


@dataclass
class Twin(Merge):
    residual: int = 8
    """Rank q of what is kept of each input beside the shared change (paper: 8)."""
    gates: Sequence[float] | None = None
    """How much of each residual to add, one number an input; None adds none: the shared change."""
    scale: float = 1.0
    """Factor on the shared change (paper: 0.3 to 1 on the sum of tasks)."""

    def __post_init__(self) -> None:
        if self.residual < 0:
            raise PlaitError(f"twin: residual is a rank of 0 or more, not {self.residual}.")

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        if self.gates is None:
            return LowRank.weighted_sum(lows, [self.scale * w for w in weights])
        if len(self.gates) != len(lows):
            raise PlaitError(
                f"twin: {len(self.gates)} gates for {len(lows)} inputs; give one for each."
            )
        shared, residuals, _ = parts(lows, weights, self.residual, self.scale)
        total = LowRank.weighted_sum([shared, *residuals], [1.0, *self.gates])
        return total.truncate(energy=1.0)[0]  # all of it lies in the span of the inputs


METHOD = MergeMethod(
    name="twin",
    title="Twin-Merging: a shared change and small residuals to gate",
    paper="Lu et al., 2024, arXiv 2406.15479",
    merge=Twin,
)
