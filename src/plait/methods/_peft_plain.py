"""PEFT types that know nn.Linear alone, and not the transposed linears of transformers' Conv1D."""

from __future__ import annotations

from collections.abc import Mapping

from plait.adapter import Delta
from plait.adapter.formats.peft_codec import any_transposed
from plait.errors import PlaitError


def refuse_transposed(deltas: Mapping[str, Delta], name: str) -> None:
    """PlaitError where a delta sits on a transposed linear."""
    if any_transposed(deltas):
        raise PlaitError(
            f"PEFT's {name} has no transposed linears (transformers' Conv1D); export a LoRA with "
            "adapter.to_lora()."
        )
