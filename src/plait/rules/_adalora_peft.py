"""PEFT's AdaLoRA form: lora_A [r, in], lora_B [out, r] and lora_E [r, 1] at each site.

PEFT scales by lora_alpha / (init_r + 1e-5), whatever rank a site has left; `rank_pattern` says
which of the init_r triplets those in the file are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from plait.adapter import Delta, PeftCodec, PeftSite, Site
from plait.adapter.formats.peft_codec import NOT_OURS, any_transposed, one_value
from plait.adapter.site import LinearSite
from plait.errors import FormatError, PlaitError
from plait.rules._triplets import TripletDelta

KEYS = {"A": "lora_A", "B": "lora_B", "e": "lora_E"}
SCHEDULE = ("init_r", "target_r", "total_step", "tinit", "tfinal", "deltaT")
SETTINGS = (*SCHEDULE, "beta1", "beta2", "orth_reg_weight")
_TINY = 1e-5
"""What PEFT adds to the rank that it divides by."""


def _options(found: PeftSite) -> dict[str, Any]:
    config = found.config
    start = int(config.get("init_r", 12))
    stored = found.tensors.get(KEYS["A"])
    rank = start if stored is None else stored.shape[0]
    alpha = float(config.get("lora_alpha", 8))
    scaling = (alpha if alpha > 0 else start) / (start + _TINY)
    return {
        "rank": rank,
        "alpha": scaling * max(rank, 1),
        "dropout": float(config.get("lora_dropout") or 0.0),
    }


def _bare_site(found: PeftSite) -> Site | None:
    if KEYS["A"] not in found.tensors or KEYS["B"] not in found.tensors:
        return None
    shape = (found.tensors[KEYS["B"]].shape[0], found.tensors[KEYS["A"]].shape[1])
    return LinearSite(found.path, shape)  # a convolution's factors look no different


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    found = {path: cast(TripletDelta, d) for path, d in deltas.items()}
    scaling = next(iter(found.values())).scaling
    if not all(math.isclose(d.scaling, scaling, rel_tol=1e-12) for d in found.values()):
        raise PlaitError(
            "PEFT's AdaLoRA has one scaling for all sites; save in Plait's format, or "
            "adapter.to_lora() in PEFT's."
        )
    ranks = {path: d.rank for path, d in found.items()}
    start = max(ranks.values())
    config: dict[str, Any] = {
        "init_r": start,
        "target_r": max(1, round(sum(ranks.values()) / len(ranks))),
        "lora_alpha": scaling * (start + _TINY),
        "lora_dropout": one_value(deltas, "dropout"),
        "fan_in_fan_out": any_transposed(deltas),
        "bias": "none",
        "total_step": 1,  # PEFT refuses to load a configuration without one
    }
    if min(ranks.values()) < start:
        kept = {f"{p}.lora_E": [True] * r + [False] * (start - r) for p, r in ranks.items()}
        config["rank_pattern"] = kept
    return config


def _read(delta: Delta, found: PeftSite) -> None:
    for own, theirs in KEYS.items():
        target = delta.get_parameter(own)
        stored = found.tensors.get(theirs)
        if stored is None or stored.numel() != target.numel():
            has = "is missing" if stored is None else f"has shape {list(stored.shape)}"
            raise FormatError(
                f"{found.path!r}: {theirs} {has}, but {list(target.shape)} is needed."
            )
        with torch.no_grad():
            target.copy_(stored.reshape(target.shape))


def _write(delta: Delta) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {t: delta.get_parameter(own) for own, t in KEYS.items()}
    return tensors | {KEYS["e"]: tensors[KEYS["e"]].reshape(-1, 1)}


CODEC = PeftCodec(
    type="ADALORA",
    keys=KEYS,
    options=_options,
    config=_config,
    site=_bare_site,
    read=_read,
    write=_write,
    required=NOT_OURS,
    settings=SETTINGS,
)
