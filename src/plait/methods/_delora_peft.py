"""DeLoRA in a PEFT folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.adapter import Delta, PeftCodec, PeftSite
from plait.adapter.formats.peft_codec import any_transposed, one_value
from plait.errors import FormatError, PlaitError

NAMES = {"A": "delora_A", "B": "delora_B", "strength": "delora_lambda", "lengths": "delora_w_norm"}


def _options(found: PeftSite) -> dict[str, Any]:
    config, stored = found.config, found.tensors.get("delora_A")
    return {
        "rank": config["r"] if stored is None else len(stored),
        "strength": float(config.get("delora_lambda", 15)),
        "start": "zero",
        "dropout": config.get("module_dropout") or 0.0,
    }


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    if any_transposed(deltas):
        raise PlaitError("PEFT's DeLoRA acts on nn.Linear only; save in Plait's format.")
    if one_value(deltas, "start") != "zero":
        raise PlaitError(
            "PEFT's DeLoRA subtracts no start; save to_lora(), or train with start='zero'."
        )
    ranks = {path: d.options.rank for path, d in deltas.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    strengths = Counter(d.options.strength for d in deltas.values())
    others = {path: r for path, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "delora_lambda": strengths.most_common(1)[0][0],
        "module_dropout": one_value(deltas, "dropout"),
        "rank_pattern": others,
    }


def _read(delta: Delta, found: PeftSite) -> None:
    target = dict(delta.own_tensors())
    for own, theirs in NAMES.items():
        if theirs not in found.tensors or target[own].shape != found.tensors[theirs].shape:
            raise FormatError(f"{found.path!r}: {theirs} is missing or has another shape.")
        target[own].copy_(found.tensors[theirs])


def _write(delta: Delta) -> dict[str, Tensor]:
    tensors = dict(delta.own_tensors())
    return {theirs: tensors[own] for own, theirs in NAMES.items()}


PEFT = PeftCodec(
    type="DELORA",
    keys=NAMES,
    options=_options,
    config=_config,
    read=_read,
    write=_write,
    settings=("delora_lambda", "module_dropout", "lambda_pattern"),
)
