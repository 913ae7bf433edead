"""`merge`: several adapters into one plain LoRA, site by site, in factor space.

    adapters ──► checks ──► for each site: [LowRank, ...] ──► method ──► truncation ──► LoRA

Nothing dense is formed for adapters that have factors, and one site at a time is worked on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Adapter, Site
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.method import MergeMethod, get_merge_method, merge_options
from plait.merging.result import Result
from plait.merging.sources import (
    Source,
    bias_of,
    check_adapters,
    check_weights,
    delta_of,
    labelled,
    read_sources,
)


def merge(
    adapters: Sequence[Source],
    method: str | MergeMethod = "linear",
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    name: str = "merged",
    progress: bool = False,
    **options: Any,
) -> Adapter:
    """One plain LoRA (scaling 1, on the CPU, attached to nothing) out of several adapters.

    Args:
        adapters: `Adapter`s or paths, of any methods that are linear in their input. Ranks,
            scalings and sites may differ: an adapter counts as zero where it does not act.
        method: a name from `plait methods --merge`, or a `MergeMethod`.
        weights: one for each adapter, any sign; None takes their mean (1 / k each).
        rank, energy: cut each site to this rank, or to the fewest components that hold this share
            of its squared norm, by the best approximation. With neither nothing is cut, and the
            linear merge has the sum of the ranks (at most the site's shorter side).
        name: the result's.
        progress: show a bar on stderr.
        **options: the method's own.

    `result.info["merge"]` says what went in, `info["dropped_energy"]` what the cut cost at each
    site (a share of its squared norm; the total is in `info["merge"]`).
    Raises PlaitError for an unknown method or option (naming the nearest), adapters of different
    bases or shapes, NaN or infinity, and deltas that need a base they are not attached to.
    """
    with torch.no_grad():
        chosen = get_merge_method(method)
        keywords = merge_options(chosen, options)
        _check_cut(rank, energy)
        inputs = read_sources(adapters)
        factors = check_weights(weights, len(inputs))
        sites = check_adapters(inputs)
        result = Result()
        for path in _tracked(sites, progress):
            deltas = [delta_of(a, label, sites[path]) for label, a in labelled(inputs)]
            low = chosen.merge(_alike(deltas), factors, **keywords)
            bias = _sum_biases([bias_of(a, path) for a in inputs], factors)
            result.add(sites[path], *_cut(low, rank, energy), bias)
        facts = {
            "method": chosen.name,
            "options": keywords,
            "weights": factors,
            "adapters": [a.name for a in inputs],
            "dropped_energy": result.dropped_energy,
        }
        return result.adapter(name, _base_facts(inputs) | {"merge": facts})


def _check_cut(rank: int | None, energy: float | None) -> None:
    if rank is not None and rank < 1:
        raise PlaitError(f"rank must be at least 1, not {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise PlaitError(f"energy is a share in (0, 1], not {energy}.")


def _tracked(sites: dict[str, Site], progress: bool) -> Iterable[str]:
    if not progress:
        return sites
    from rich.console import Console
    from rich.progress import track

    return track(sites, "merging", console=Console(stderr=True), transient=True)


def _alike(deltas: list[LowRank]) -> list[LowRank]:
    """On one device and in the widest of the dtypes, so that methods need not look."""
    dtype = deltas[0].dtype
    for delta in deltas[1:]:
        dtype = torch.promote_types(dtype, delta.dtype)
    return [delta.to("cpu", dtype) for delta in deltas]


def _cut(low: LowRank, rank: int | None, energy: float | None) -> tuple[LowRank, float, float]:
    """What is kept, the share of energy dropped, and the squared norm that it is a share of."""
    shorter = min(low.shape)
    limit = shorter if rank is None else rank
    if energy is None and low.rank <= limit:
        exact = rank is None  # then no share is asked for anywhere
        return low, 0.0, 0.0 if exact else float(low.norm()) ** 2
    kept, dropped = low.truncate(rank=limit, energy=energy)
    # The factors carry the root of each singular value on columns of norm one.
    square = float(kept.B.double().square().sum(-2).square().sum())
    return kept, dropped, square / (1 - dropped) if dropped < 1 else 0.0


def _sum_biases(biases: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    terms = [w * b.detach().cpu() for w, b in zip(weights, biases, strict=True) if b is not None]
    return torch.stack(terms).sum(0) if terms else None


def _base_facts(inputs: Sequence[Adapter]) -> dict[str, Any]:
    """What the files say about the base, from the first adapter that says it."""
    facts: dict[str, Any] = {}
    for adapter in inputs:
        for key, value in adapter.info.items():
            if key.startswith("base") or key == "task_type":
                facts.setdefault(key, value)
    return facts
