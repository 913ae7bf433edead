"""LaMDA++: LaMDA with more rank where W's spectrum is flat, and less where it falls fast.

    E_l(k) = sum of the k largest sigma_i^2 / |W_l|_F^2        share of W that k directions hold

A small candidate set of ranks around the one asked for, (1 - spread) r, r and (1 + spread) r, is
dealt out before training, from W alone. "groups" sorts the sites by E_l(r): the lower third, whose
r directions say least, gets the largest rank, the upper third the smallest, what is left over r.
"energy" takes the ranks that hold the most energy in sum. Either way the mean rank is r.
The scaling stays as configured: alpha follows the rank. Freezing is LaMDA's.
Paper: Azizi, Kundu, Pedram, 2024, arXiv 2406.12832. Parameters: r_l^2 + r_l out a site at the
start, r_l^2 in the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from plait.adapter import Delta, Initializer, Method, Site
from plait.adapter.choices import check_choices
from plait.adapter.seeds import generator
from plait.errors import PlaitError
from plait.linalg import randomized_svd
from plait.linalg.allocate import allocate
from plait.rules.lamda import METHOD as LAMDA
from plait.rules.lamda import Lamda


@dataclass
class SpectralRanks(Initializer):
    spread: float = 0.5
    """How far the largest and the smallest rank lie from r, as a share of it; below 1."""
    by: Literal["groups", "energy"] = "groups"
    """Deal ranks to three groups of equal size, or where they hold most of W."""

    def __post_init__(self) -> None:
        check_choices(self, "lamda-plus-plus")
        if not 0 <= self.spread < 1:
            raise PlaitError(f"lamda-plus-plus: spread lies in [0, 1), not {self.spread}.")

    def collect(
        self, model: nn.Module, sites: Sequence[Site], data: Iterable[Any] | None, rank: int
    ) -> dict[str, Any]:
        """{path: E_l(0), E_l(1), ..} up to the largest candidate."""
        return {s.path: energies(s.weight().detach(), self._candidates(rank)[-1]) for s in sites}

    def ranks(self, sites: Sequence[Site], statistics: dict[str, Any], rank: int) -> dict[str, int]:
        low, _, high = candidates = self._candidates(rank)
        if low == high:
            return dict.fromkeys(statistics, rank)
        for site in sites:
            if high > min(site.shape):
                raise PlaitError(
                    f"lamda-plus-plus: ranks up to {high} do not fit {site.path!r} "
                    f"{list(site.shape)}; lower rank or spread, or exclude it."
                )
        if self.by == "energy":
            worth = {path: [float(E[k]) for k in candidates] for path, E in statistics.items()}
            chosen = allocate(worth, rank * len(worth), dict.fromkeys(worth, candidates))
            return {path: candidates[index] for path, index in chosen.items()}
        order = sorted(statistics, key=lambda path: (float(statistics[path][rank]), path))
        third = len(order) // 3
        flat, steep = order[:third], order[len(order) - third :]
        return dict.fromkeys(order, rank) | dict.fromkeys(flat, high) | dict.fromkeys(steep, low)

    def _candidates(self, rank: int) -> tuple[int, int, int]:
        step = min(round(self.spread * rank), max(rank - 1, 0))
        return rank - step, rank, rank + step

    def start(self, delta: Delta, statistics: Any) -> None:
        """Nothing: the delta starts at W's singular directions by itself."""


def energies(W: Tensor, most: int) -> Tensor:
    """E(k) [most + 1], for k = 0 to `most` (not beyond W's shorter side)."""
    most = min(most, *W.shape)
    squares = randomized_svd(W, most, generator=generator(0, "energies"))[1].double().square()
    total = squares.new_zeros(most + 1)
    total[1:] = squares.cumsum(0) / W.double().square().sum().clamp_min(1e-300)
    return total


METHOD = Method(
    name="lamda-plus-plus",
    title="LaMDA++: LaMDA with ranks by spectrum",
    paper="Azizi et al., 2024, arXiv 2406.12832",
    axis="parameterisation",
    options=LAMDA.options,
    delta=LAMDA.delta,
    count=LAMDA.count,
    rule=Lamda,
    initializer=SpectralRanks,
)
