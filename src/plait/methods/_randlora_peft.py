"""RandLoRA in a PEFT folder, which holds the shared bases too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.adapter import Delta, PeftCodec, PeftSite
from plait.adapter.formats.peft_codec import any_transposed, one_value
from plait.errors import FormatError

NAMES = {"lam": "randlora_lambda", "gamma": "randlora_gamma"}


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    rank, alpha, bases = (one_value(deltas, n) for n in ("rank", "alpha", "bases"))
    return {
        "r": rank,
        "randlora_alpha": 20 * rank if alpha is None else alpha,
        "randlora_dropout": one_value(deltas, "dropout"),
        "sparse": bases == "sparse",
        "very_sparse": bases == "very-sparse",
        "fan_in_fan_out": any_transposed(deltas),
    }


def _options(found: PeftSite) -> dict[str, Any]:
    c = found.config
    bases = "very-sparse" if c.get("very_sparse") else "sparse" if c.get("sparse") else "uniform"
    return {
        "rank": c["r"],
        "alpha": float(c.get("randlora_alpha", 640)),
        "bases": bases,
        "dropout": c.get("randlora_dropout") or 0.0,
    }


def _read(delta: Delta, found: PeftSite) -> None:
    for own, theirs in NAMES.items():
        target, stored = delta.get_parameter(own), found.tensors.get(theirs)
        if stored is None or stored.shape != target.shape:
            raise FormatError(f"{found.path!r}: {theirs} is missing or not {list(target.shape)}.")
        target.copy_(stored)


PEFT = PeftCodec(
    type="RANDLORA",
    # PEFT also saves the shared bases once more under every site.
    keys=NAMES | {name: f"randlora_{name}" for name in "AB"},
    shared={"A": "base_model.randlora_A", "B": "base_model.randlora_B"},
    options=_options,
    config=_config,
    read=_read,
    write=lambda delta: {theirs: delta.get_parameter(own) for own, theirs in NAMES.items()},
    settings=("randlora_alpha", "randlora_dropout", "sparse", "very_sparse"),
)
