"""`merge`: several adapters into one plain LoRA, site by site.

    adapters ──► checks ──► for each site: Changes ──► method, in its space ──► truncation ──► LoRA

One site at a time is worked on. In the spaces `factors` and `aligned` nothing of W's size is formed
for adapters that have factors; in `delta` one matrix of W's size, in blocks of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Adapter
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.cut import check_cut, cut_low_rank, cut_matrix
from plait.merging.method import Merge, MergeMethod, choose_space, get_merge_method, make_merge
from plait.merging.originals import Base, open_originals
from plait.merging.progress import tracked
from plait.merging.result import Result
from plait.merging.sources import (
    Source,
    Weights,
    bias_of,
    check_adapters,
    check_weights,
    delta_of,
    labelled,
    read_sources,
    weights_at,
)
from plait.merging.spaces import by_entries, merge_site
from plait.merging.stored import Statistics, open_statistics


def merge(
    adapters: Sequence[Source],
    method: str | MergeMethod = "linear",
    weights: Sequence[Weights] | None = None,
    *,
    space: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    statistics: Sequence[Statistics] | None = None,
    base: Base | None = None,
    seed: int = 0,
    name: str = "merged",
    progress: bool = False,
    **options: Any,
) -> Adapter:
    """One plain LoRA (scaling 1, on the CPU, attached to nothing) out of several adapters.

    Args:
        adapters: `Adapter`s or paths, of any methods that are linear in their input. Ranks,
            scalings and sites may differ: an adapter counts as zero where it does not act.
        method: a name from `plait methods --merge`, or a `MergeMethod`.
        weights: one for each adapter, any sign, or {site path: weight} (a site that is not named
            has weight 1, as in `plait.activate`); None takes their mean (1 / k each).
        space: "factors", "aligned" or "delta" (see `plait.merging.method`); None takes the method's
            best one for adapters.
        rank, energy: cut each site to this rank, or to the fewest components that hold this share
            of its squared norm, by the best approximation. With neither nothing is cut but what
            merges of space "delta" have beyond the sum of the ranks.
        statistics: for methods that need some, what `plait.merging.statistics` made of data, for
            each adapter: {site path: tensor}, or the path of a .safetensors file of them.
        base: for methods that read the base's weights: a model, or a checkpoint's folder or file,
            of which one site at a time is read; None asks the models that adapters are attached to.
        seed: of methods that draw. The result depends on nothing else: neither on threads nor on
            the order or the blocks in which sites are worked on.
        name: the result's.
        progress: show a bar on stderr.
        **options: the method's own.

    `result.info["merge"]` says what went in, `info["dropped_energy"]` what the cut cost at each
    site (a share of its squared norm; the total is in `info["merge"]`).
    Raises PlaitError for an unknown method or option (naming the nearest), adapters of different
    bases or shapes, NaN or infinity, and deltas that need a base they are not attached to.
    """
    with torch.no_grad(), ExitStack() as stack:
        chosen = get_merge_method(method)
        way = make_merge(chosen, options)
        where = choose_space(chosen.name, way, space)
        check_cut(rank, energy)
        inputs = read_sources(adapters)
        factors = check_weights(weights, len(inputs), inputs)
        known = open_statistics(chosen.name, way.needs, statistics, len(inputs))
        if chosen.inputs not in (None, len(inputs)):
            raise PlaitError(f"{chosen.name} merges {chosen.inputs} inputs, not {len(inputs)}.")
        sites = check_adapters(inputs)
        opened = open_originals(chosen.name, base, inputs) if way.reads_base else None
        original = None if opened is None else stack.enter_context(opened)
        result = Result()
        for path in tracked(sites, len(sites), progress):
            lows = _alike([delta_of(a, label, sites[path]) for label, a in labelled(inputs)])
            here = weights_at(factors, path)
            seen = None if known is None else [s.get(path) for s in known]
            W, b = (None, None) if original is None else original(sites[path])
            changes = Changes(path, lows, seed=seed, statistics=seen, original=W)
            found = merge_site(way, changes, here, where)
            if isinstance(found, Tensor):
                cut = cut_matrix(found, rank, energy, sum(low.rank for low in lows))
            else:
                cut = cut_low_rank(found, rank, energy)
            bias = _merge_biases(way, path, [bias_of(a, path) for a in inputs], here, seed, b)
            result.add(sites[path], *cut, bias)
        facts = {
            "method": chosen.name,
            "space": where,
            "options": dataclasses.asdict(way),  # type: ignore[call-overload]
            "weights": factors,
            "adapters": [a.name for a in inputs],
            "dropped_energy": result.dropped_energy,
        }
        return result.adapter(name, _base_facts(inputs) | {"merge": facts})


def _alike(deltas: list[LowRank]) -> list[LowRank]:
    """On one device and in the widest of the dtypes, so that methods need not look."""
    dtype = deltas[0].dtype
    for delta in deltas[1:]:
        dtype = torch.promote_types(dtype, delta.dtype)
    return [delta.to("cpu", dtype) for delta in deltas]


def _merge_biases(
    way: Merge,
    path: str,
    biases: Sequence[Tensor | None],
    weights: Sequence[float],
    seed: int,
    original: Tensor | None,
) -> Tensor | None:
    """Biases as matrices of one row, where the method works entry by entry without statistics;
    else their sum."""
    first = next((b for b in biases if b is not None), None)
    if first is None:
        return None
    known = [torch.zeros_like(first) if b is None else b for b in biases]
    rows = [b.detach().cpu()[None] for b in known]
    if way.needs or "delta" not in way.spaces:
        return sum(w * row[0] for w, row in zip(weights, rows, strict=True))  # type: ignore[return-value]
    changes = Changes(f"{path}.bias", dense=rows, seed=seed, original=original)
    return by_entries(way, changes, weights)[0]


def _base_facts(inputs: Sequence[Adapter]) -> dict[str, Any]:
    """What the files say about the base, from the first adapter that says it."""
    facts: dict[str, Any] = {}
    for adapter in inputs:
        for key, value in adapter.info.items():
            if key.startswith("base") or key == "task_type":
                facts.setdefault(key, value)
    return facts
