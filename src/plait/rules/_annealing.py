"""When ranks fall during training, and how a stage's ranks are dealt to the sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.adapter import PairDelta, Run
from plait.errors import PlaitError
from plait.linalg import best_components
from plait.linalg.factored import rank_for_energy

Plan = list[list[int]]
"""[[optimiser step, average rank after it], ...], both in order."""


def halvings(source: int, target: int) -> list[int]:
    """source/2, source/4, .. down to target."""
    ranks = []
    while source > target:
        source = max(target, source // 2)
        ranks.append(source)
    return ranks


def plan_annealing(run: Run, source: int, o: Any) -> Plan:
    """The stages from rank `source` down; `o` has `target_rank`, `ranks` and `at`.

    Raises PlaitError for ranks that do not fall or steps that do not rise, and for a target above
    the source.
    """
    ranks = halvings(source, o.target_rank) if o.ranks is None else list(o.ranks)
    last = o.target_rank if o.ranks is None else (ranks or [0])[-1]
    if not 1 <= last <= source or sorted(set(ranks), reverse=True) != ranks:
        raise PlaitError(
            f"lora-squeeze: ranks {ranks or [last]} must fall, to at least 1 and at most the "
            f"adapter's own rank, {source}."
        )
    if o.at is not None and o.ranks is None:
        raise PlaitError("lora-squeeze: `at` says when `ranks` are reached; give both.")
    steps = _intervals(run, len(ranks)) if o.at is None else [run.steps(share) for share in o.at]
    if len(steps) != len(ranks) or steps != sorted(set(steps)) or 0 in steps:
        raise PlaitError(
            f"lora-squeeze: {len(ranks)} cuts need as many rising steps of at least 1, not {steps}."
        )
    return [list(stage) for stage in zip(steps, ranks, strict=True)]


def _intervals(run: Run, cuts: int) -> list[int]:
    if cuts and run.total_steps is None:
        raise PlaitError("lora-squeeze: equal intervals need total_steps; or give `at`.")
    return [round((run.total_steps or 0) * i / (cuts + 1)) for i in range(1, cuts + 1)]


def pooled(spectra: Mapping[str, Tensor], rank: int) -> dict[str, int]:
    """The largest singular values of all sites, `rank` a site on average and at least 1 each."""
    beyond = {name: S[1:] for name, S in spectra.items()}
    best = best_components(beyond, (rank - 1) * len(spectra))
    return {name: 1 + int(mask.sum()) for name, mask in best.items()}


def by_energy(spectra: Mapping[str, Tensor], rank: int, share: float) -> dict[str, int]:
    """As few as hold `share` of a site's squares, from 1 to `rank`."""
    return {n: max(1, min(rank, rank_for_energy(S, share, len(S)))) for n, S in spectra.items()}


def spectrum(delta: PairDelta) -> Tensor:
    """Singular values [r] of the trained dW, on the CPU; packed experts taken together."""
    S = delta.trained().singular_values().detach().double().cpu()
    return S.square().flatten(0, -2).sum(0).sqrt() if S.dim() > 1 else S
