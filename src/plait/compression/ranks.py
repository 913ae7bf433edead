"""How many singular components each site keeps: a fixed rank, a share of energy, or a budget.

rank     the same number everywhere (fewer where a site has fewer)
energy   at each site the fewest that hold this share of its squared norm
budget   so many numbers in all: the components that hold most for their price, wherever they are
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import allocate
from plait.merging import cut


def check_cut(rank: int | None, energy: float | None, budget: int | None) -> None:
    """Exactly one of the three, within its range; PlaitError otherwise."""
    given = [
        n for n, v in (("rank", rank), ("energy", energy), ("budget", budget)) if v is not None
    ]
    if len(given) != 1:
        said = " and ".join(given) or "none of them"
        raise PlaitError(f"give one of rank=, energy= and budget=, not {said}.")
    cut.check_cut(rank, energy)
    if budget is not None and budget < 0:
        raise PlaitError(f"budget counts numbers and must be at least 0, not {budget}.")


def choose_ranks(
    spectra: Mapping[str, Tensor],
    totals: Mapping[str, float],
    prices: Mapping[str, int],
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
) -> dict[str, int]:
    """{site: components kept}.

    Args:
        spectra: singular values [k] of each site, descending; possibly only the leading ones.
        totals: squared norm of each site, of which `energy` is a share.
        prices: numbers that one component costs at each site (out + in).
        budget: numbers in all; the greatest total energy that the greedy allocation finds.
    """
    check_cut(rank, energy, budget)
    held = {site: _held(S) for site, S in spectra.items()}
    if budget is not None:
        price = {s: [prices[s] * i for i in range(len(h))] for s, h in held.items()}
        return allocate({s: h.tolist() for s, h in held.items()}, budget, price)
    if energy is None:
        return {s: min(rank or 0, len(h) - 1) for s, h in held.items()}
    return {s: enough(spectra[s], energy, totals[s]) for s in held}


def enough(S: Tensor, energy: float, total: float) -> int:
    """The fewest leading values of S whose squares hold `energy` of `total`; all if none do.

    Values at rounding level (of float32, for S of that dtype) never count.
    """
    alive = int((8 * torch.finfo(S.dtype).eps * S[:1] < S).sum())
    short = _held(S)[:-1] < energy * total
    return min(int(short.sum()), alive)


def _held(S: Tensor) -> Tensor:
    """[k + 1]: the energy of the first 0, 1, ... k components, in float64."""
    squares = S.detach().to("cpu", torch.float64).square()
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)])
