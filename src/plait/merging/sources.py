"""What goes into a merge: adapters from paths, and the checks before any work is done."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Adapter, Site, low_rank_of
from plait.adapter.site import layout
from plait.errors import PlaitError, unknown
from plait.linalg import LowRank

Source = Adapter | str | os.PathLike[str]
Weights = float | Mapping[str, float]
"""One weight for a whole adapter, or {site path: weight}; a site that is not named has weight 1."""


def read_sources(sources: Sequence[Source]) -> list[Adapter]:
    """The adapters themselves; paths are read (from disk, without a base model)."""
    if isinstance(sources, Adapter | str | os.PathLike):
        raise PlaitError("merge takes a list of adapters or paths, even of one.")
    if not sources:
        raise PlaitError("there is nothing to merge; give at least one adapter or path.")
    return [source if isinstance(source, Adapter) else _read(source) for source in sources]


def _read(path: str | os.PathLike[str]) -> Adapter:
    from plait.adapter.formats import read_adapter

    return read_adapter(Path(path))


def check_weights(
    weights: Sequence[Weights] | None, count: int, adapters: Sequence[Adapter] = ()
) -> list[Any]:
    """Finite numbers for each adapter, one or by site; None gives each 1 / count."""
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count:
        raise PlaitError(f"{len(weights)} weights for {count} adapters; give one for each.")
    found: list[Any] = []
    for index, weight in enumerate(weights):
        numbers = dict(weight) if isinstance(weight, Mapping) else {"": weight}
        for path in numbers if adapters and isinstance(weight, Mapping) else ():
            if path not in adapters[index].deltas:
                where = f"adapter {adapters[index].name!r}"
                raise unknown("site", path, adapters[index].deltas, where=where)
        if bad := [w for w in numbers.values() if not math.isfinite(w)]:
            raise PlaitError(f"weight {bad[0]} is not a finite number.")
        plain = {path: float(w) for path, w in numbers.items()}
        found.append(plain if isinstance(weight, Mapping) else plain[""])
    return found


def weights_at(weights: Sequence[Weights], path: str) -> list[float]:
    """Every adapter's weight at one site."""
    return [w.get(path, 1.0) if isinstance(w, Mapping) else w for w in weights]


def check_adapters(adapters: Sequence[Adapter]) -> dict[str, Site]:
    """The union of the sites; raises when the adapters are damaged or do not belong together."""
    _check_bases(adapters)
    sites: dict[str, tuple[Site, str]] = {}
    for label, adapter in labelled(adapters):
        adapter.check()
        for path, delta in adapter.deltas.items():
            site = delta.site.bare()
            known, first = sites.setdefault(path, (site, label))
            if known.shape != site.shape or layout(known) != layout(site):
                raise PlaitError(
                    f"site {path!r} is {layout(known)} {list(known.shape)} in adapter {first} but "
                    f"{layout(site)} {list(site.shape)} in {label}; merge adapters of one base "
                    "model."
                )
    if not sites:
        raise PlaitError("the adapters have no sites, so there is nothing to merge.")
    return {path: site for path, (site, _) in sites.items()}


def _check_bases(adapters: Sequence[Adapter]) -> None:
    """Adapters that do not know their base are taken at their word (the shapes must still fit)."""
    seen: dict[str, str] = {}
    for label, adapter in labelled(adapters):
        mark = adapter.info.get("base_fingerprint")
        if mark is not None:
            seen.setdefault(str(mark), label)
    if len(seen) > 1:
        (one, first), (other, second) = list(seen.items())[:2]
        raise PlaitError(
            f"adapters {first} and {second} were trained on different base models (fingerprints "
            f"{one[:8]} and {other[:8]}); only adapters of one base can be merged."
        )


def labelled(adapters: Sequence[Adapter]) -> list[tuple[str, Adapter]]:
    """Each adapter with its name for messages, numbered where several have the same name."""
    names = [adapter.name for adapter in adapters]
    return [
        (f"{a.name!r}" + (f" (number {i})" if names.count(a.name) > 1 else ""), a)
        for i, a in enumerate(adapters, 1)
    ]


def delta_of(adapter: Adapter, label: str, site: Site) -> LowRank:
    """The change of one adapter at one site, without loss; rank 0 where it does not act."""
    if site.path not in adapter.deltas:
        dtype = next((p.dtype for p in adapter.parameters()), torch.float32)
        rows, columns = site.shape[-2:]
        return LowRank(torch.zeros(rows, 0, dtype=dtype), torch.zeros(0, columns, dtype=dtype))
    delta = adapter.deltas[site.path]
    if delta.traits.depends_on_base and delta.site.module is None:
        raise PlaitError(
            f"adapter {label} ({adapter.method.name}) needs the base weights to say what it "
            "changes; attach it first with plait.load(model, path), or `plait merge --base ...`."
        )
    # Without exact factors, energy 1 cuts only what is below rounding.
    energy = None if delta.factors() is not None else 1.0
    return low_rank_of(delta, energy=energy)[0]


def bias_of(adapter: Adapter, path: str) -> Tensor | None:
    """The change of the bias at one site, or None."""
    return adapter.deltas[path].bias() if path in adapter.deltas else None
