"""Coefficients in a file: `plait merge --weights FILE` and `plait.activate` take what is read.

    {"sql": {"model.layers.0.mlp.up_proj": 0.5,
             "model.layers.1.mlp.up_proj": {"rows": [0.2, 0.7], "of": 1536}}, "french": ...}

A number is a site's weight; "rows" (or "columns") are those of even chunks of so many.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Adapter, low_rank_of
from plait.adapter.convert import lora_from
from plait.adapter.weighting import Weight, is_number, weighted_bias, weighted_factors
from plait.errors import FormatError
from plait.merging.search.groups import Part

Stored = dict[str, dict[str, Weight]]


def write_coefficients(path: str | os.PathLike[str], weights: Mapping[str, Any]) -> Path:
    """Write what `Coefficients.described_weights` gives."""
    target = Path(path)
    target.write_text(json.dumps(weights, indent=1) + "\n", encoding="utf-8")
    return target


def read_coefficients(path: str | os.PathLike[str]) -> Stored:
    """{adapter's name: {site path: weight}}; FormatError for anything else."""
    file = Path(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise FormatError(
            f"{file} is no JSON; give a coefficients.json of `plait search`."
        ) from None
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise FormatError(f"{file} holds no coefficients ({{adapter: {{site: weight}}}}).")
    return {
        name: {site: _weight(value, f"{file}: {name}: {site}") for site, value in sites.items()}
        for name, sites in found.items()
    }


def _weight(value: Any, where: str) -> Weight:
    if _number(value):
        return float(value)
    for along in ("rows", "columns"):
        numbers = value.get(along) if isinstance(value, dict) else None
        if numbers and isinstance(numbers, list) and all(map(_number, numbers)):
            size = value.get("of")
            if isinstance(size, int) and size >= len(numbers):
                part = Part(tuple(range(len(numbers))), along, size)
                return part.weight(numbers, torch.tensor(numbers, dtype=torch.float64), 0.0)
    raise FormatError(f"{where}: {value!r} is no weight; a number, or rows or columns `of` a size.")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def fold(
    adapters: Sequence[Adapter], weights: Sequence[Mapping[str, Weight]]
) -> tuple[list[Adapter], list[dict[str, float]]]:
    """Adapters and weights that are numbers: weights by row or column go into the factors, exactly.

    An adapter that has such weights comes back as a plain LoRA of the same rank, the others are
    themselves.
    """
    pairs = [_folded(a, w) for a, w in zip(adapters, weights, strict=True)]
    return [a for a, _ in pairs], [w for _, w in pairs]


def _folded(adapter: Adapter, weights: Mapping[str, Weight]) -> tuple[Adapter, dict[str, float]]:
    if all(is_number(w) for w in weights.values()):
        return adapter, {path: float(w) for path, w in weights.items()}
    lows, biases = {}, {}
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            weight = weights.get(path, 1.0)
            weight = weight.cpu() if isinstance(weight, Tensor) else weight
            exact = delta.factors() is not None
            low = low_rank_of(delta, energy=None if exact else 1.0)[0].to("cpu")
            lows[path] = weighted_factors(low, weight)
            if (bias := delta.bias()) is not None:
                biases[path] = weighted_bias(bias.cpu(), weight)
    sites = [delta.site for delta in adapter.deltas.values()]
    made = lora_from(adapter.name, sites, lows, biases, seed=adapter.seed, info=adapter.info)
    return made, dict.fromkeys(adapter.deltas, 1.0)
