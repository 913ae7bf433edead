"""VB-LoRA in a PEFT folder: all logits, or of each piece the k indices and k - 1 of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Delta, PeftCodec, PeftSite
from plait.adapter.formats.peft_codec import any_transposed, one_value
from plait.errors import FormatError

BANK = "base_model.vblora_vector_bank"
NAMES = {"logits_A": "vblora_logits_A", "logits_B": "vblora_logits_B"}
SHORT = ("_topk_indices", "_topk_weights")
NEVER, LEAST = -1e4, -1e3
"""Logits of what a short form left out, and of a weight of 0; finite, so that training goes on."""


def _options(found: PeftSite) -> dict[str, Any]:
    config, bank = found.config, found.shared.get(BANK)
    vectors, length = (config["num_vectors"], config["vector_length"])
    if bank is not None:  # the tensor is there, whatever the configuration says
        vectors, length = bank.shape
    return {
        "rank": config["r"],
        "vectors": vectors,
        "length": length,
        "chosen": config["topk"],
        "dropout": config.get("vblora_dropout") or 0.0,
    }


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    return {
        "r": one_value(deltas, "rank"),
        "num_vectors": one_value(deltas, "vectors"),
        "vector_length": next(iter(deltas.values())).shared["bank"].shape[-1],
        "topk": one_value(deltas, "chosen"),
        "vblora_dropout": one_value(deltas, "dropout"),
        "fan_in_fan_out": any_transposed(deltas),
    }


def _logits(found: PeftSite, name: str, vectors: int) -> Tensor:
    if name in found.tensors:
        return found.tensors[name]
    if any(name + ending not in found.tensors for ending in SHORT):
        raise FormatError(f"{found.path!r} has no {name}.")
    index, weights = (found.tensors[name + ending] for ending in SHORT)
    weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
    empty = weights.new_full((*weights.shape[:-1], vectors), NEVER)
    return empty.scatter(-1, index.long(), weights.clamp_min(0).log().clamp_min(LEAST))


def _read(delta: Delta, found: PeftSite) -> None:
    for own, theirs in NAMES.items():
        target = delta.get_parameter(own)
        logits = _logits(found, theirs, target.shape[-1])
        if logits.shape != target.shape:
            raise FormatError(
                f"{found.path!r}: {theirs} has shape {list(logits.shape)}, but "
                f"{list(target.shape)} is needed."
            )
        target.copy_(logits)


PEFT = PeftCodec(
    type="VBLORA",
    keys={n: n for n in (*NAMES.values(), *(n + e for n in NAMES.values() for e in SHORT))},
    shared={"bank": BANK},
    options=_options,
    config=_config,
    read=_read,
    write=lambda delta: {theirs: delta.get_parameter(own) for own, theirs in NAMES.items()},
    settings=(
        "num_vectors",
        "vector_length",
        "topk",
        "save_only_topk_weights",
        "vblora_dropout",
        "init_vector_bank_bound",
        "init_logits_std",
    ),
)
