"""What an adapter changes, site by site, as factors; and the rest of it, carried along."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Adapter, Site
from plait.adapter.convert import lora_from, low_rank_of
from plait.adapter.delta import Delta
from plait.adapter.formats import read_adapter
from plait.adapter.replacement import ParameterDelta, add_parameter, add_replacement, is_extra
from plait.errors import PlaitError
from plait.linalg import LowRank

Given = Adapter | str | os.PathLike[str]
"""An adapter, or where one lies."""


@dataclass
class AdapterChanges:
    """An adapter taken apart: `lows` and `biases` by site path, and what has no factors."""

    name: str
    sites: dict[str, Site]
    lows: dict[str, LowRank]
    biases: dict[str, Tensor]
    extras: dict[str, Delta]
    info: dict[str, Any]
    seed: int

    def rebuilt(self, lows: Mapping[str, LowRank], name: str | None = None) -> Adapter:
        """A plain LoRA (scaling 1) with these factors instead, and everything else as it was.

        Sites whose rank is 0 and that change no bias are not in it.
        """
        used = {p: low for p, low in lows.items() if low.rank or p in self.biases}
        sites = [self.sites[path] for path in used]
        biases = {p: b for p, b in self.biases.items() if p in used}
        result = lora_from(
            name or self.name, sites, used, biases, seed=self.seed, info=dict(self.info)
        )
        for delta in self.extras.values():
            _carry(delta, result)
        return result


def take_apart(given: Given) -> AdapterChanges:
    """The changes of an adapter of any method that is linear in its input.

    Raises PlaitError for a method that is not, and for one that needs a base it is not attached to.
    """
    adapter = given if isinstance(given, Adapter) else read_adapter(Path(given))
    adapter.check()
    main = {p: d for p, d in adapter.deltas.items() if not is_extra(d)}
    lows = {path: _factors(delta, adapter) for path, delta in main.items()}
    biases = {p: b.detach().cpu() for p, d in main.items() if (b := d.bias()) is not None}
    extras = {p: d for p, d in adapter.deltas.items() if is_extra(d)}
    sites = {path: delta.site.bare() for path, delta in main.items()}
    info = {**adapter.info, "converted_from": adapter.method.name}
    return AdapterChanges(adapter.name, sites, lows, biases, extras, info, adapter.seed)


def _factors(delta: Delta, adapter: Adapter) -> LowRank:
    if delta.traits.depends_on_base and delta.site.module is None:
        raise PlaitError(
            f"adapter {adapter.name!r} ({adapter.method.name}) needs the base weights to say what "
            "it changes; attach it first with plait.load(model, path)."
        )
    with torch.no_grad():
        if delta.factors() is None and delta.traits.linear_in_x and len(delta.site.shape) > 2:
            # Packed experts have pairs, but no factors that a forward could ride on.
            return LowRank.from_svd(*torch.linalg.svd(delta.dense().cpu(), full_matrices=False))
        energy = None if delta.factors() is not None else 1.0  # 1: nothing above rounding is cut
        low = low_rank_of(delta, energy=energy)[0]
    return LowRank(low.B.detach().cpu(), low.A.detach().cpu(), low.scale)


def _carry(delta: Delta, result: Adapter) -> None:
    """A replaced module or a changed parameter, into an adapter that is not installed."""
    path = delta.site.path
    if isinstance(delta, ParameterDelta):
        add_parameter(result, path, delta.dense().detach(), None)
        copy = result.deltas[path]
        copy.get_parameter("change").data = delta.dense().detach().cpu().clone()
        copy.dtype = delta.dtype
    else:
        tensors: Any = getattr(delta, "tensors")()  # noqa: B009 (ReplacementDelta alone is left)
        add_replacement(result, path, tensors, None, delta.site.out_features)
