"""What a merge says about its inputs: norms, cosines, conflicts of sign, site by site."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Adapter
from plait.merging.changes import Changes
from plait.merging.sources import delta_of, labelled

SAMPLE = 1 << 16
"""Numbers of each input that a site's facts are taken from, in evenly spread groups of rows."""
GROUPS = 16
Facts = dict[str, dict[str, Any]]


def site_facts(changes: Changes) -> dict[str, Any]:
    """Norms [k], cosines [k][k] and the share of entries whose signs conflict, of a sample of rows.

    An entry conflicts where two inputs change it in opposite directions. Norms are scaled up to the
    whole site.
    """
    block = torch.cat([changes.rows(rows) for rows in sampled(changes.shape)], 1)
    return facts_of(block, changes.shape)


def sampled(shape: tuple[int, int]) -> list[range]:
    """The rows that a site's facts are taken from."""
    out, columns = shape
    size = min(out, max(1, SAMPLE // (GROUPS * columns)))
    starts = range(0, out - size + 1, max(size, out // GROUPS))
    return [range(at, at + size) for at in starts]


def facts_of(block: Tensor, shape: tuple[int, int]) -> dict[str, Any]:
    """The facts of a site of this shape from rows [k, rows, in] of its changes."""
    flat = block.flatten(1).double()
    scale = (shape[0] * shape[1] / flat.shape[1]) ** 0.5
    return {**_of_gram(flat @ flat.mT, scale), "conflicts": _conflicts(block)}


def _of_gram(gram: Tensor, scale: float) -> dict[str, Any]:
    lengths = gram.diagonal().clamp_min(0).sqrt()
    cosines = gram / (lengths[:, None] * lengths).clamp_min(1e-300)
    return {
        "norms": [round(float(n) * scale, 6) for n in lengths],
        "cosines": [[round(float(c), 4) for c in row] for row in cosines],
    }


def _conflicts(block: Tensor) -> float:
    """The share of entries [k, rows, in] that two inputs change in opposite directions."""
    conflicts = (block.amax(0) > 0) & (block.amin(0) < 0)
    return round(float(conflicts.double().mean()), 4)


@torch.no_grad()
def adapter_facts(adapters: Sequence[Adapter], merged: Adapter) -> Facts:
    """The facts of a merge of adapters, site by site: norms and cosines exact, of factors.

    `norm` is the merge's, `dropped` the share of its squared norm that a cut to a rank cost.
    """
    dropped = merged.info.get("dropped_energy", {})
    facts: Facts = {}
    for path, delta in merged.deltas.items():
        found = [delta_of(a, label, delta.site) for label, a in labelled(adapters)]
        lows = [low.to("cpu", torch.float64) for low in found]
        changes = Changes(path, lows)
        gram = torch.stack([torch.stack([a.inner(b) for b in lows]) for a in lows]).double()
        block = torch.cat([changes.rows(rows) for rows in sampled(changes.shape)], 1)
        own = delta.factors()
        norm = None if own is None else round(float(own.norm()), 6)
        facts[path] = {
            **_of_gram(gram, 1.0),
            "conflicts": _conflicts(block),
            "norm": norm,
            "dropped": round(float(dropped.get(path, 0.0)), 6),
        }
    return facts


def write_report(file: Path, described: Mapping[str, Any], facts: Facts) -> None:
    """merge.json: what was done, and the facts of every site, one line each."""
    lines = [f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in facts.items()]
    head = json.dumps(dict(described), indent=1, default=str)[:-2]
    file.write_text(head + ',\n "sites": {\n' + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")
