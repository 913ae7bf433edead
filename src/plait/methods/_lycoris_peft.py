"""PEFT's form of methods whose sites have different tensors: LoHa and LoKr, and GraLoRA.

Ranks and scales of LoHa and LoKr may differ by site (`rank_pattern`, `alpha_pattern`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from plait.adapter import Delta, PeftCodec, PeftSite
from plait.adapter.formats.peft_codec import any_transposed, pattern_values
from plait.errors import FormatError, PlaitError

DROPOUTS = ("rank_dropout", "module_dropout", "rank_dropout_scale")
SETTINGS = ("alpha", *DROPOUTS, "use_effective_conv2d")
"""Keys of LycorisConfig beside those of every type. The dropouts act in training alone; where
use_effective_conv2d makes a difference it shows in tensors t1 and t2, which are refused by name."""


def rank_and_alpha(found: PeftSite) -> dict[str, Any]:
    """The options `rank` and `alpha` at a site (of the adapter, where the path is empty)."""
    rank, alpha = found.config.get("r", 8), found.config.get("alpha", 8)
    if found.path:
        ranks = pattern_values(found, "rank_pattern", rank)
        # PEFT sorts the patterns when it saves them, which may put another match first.
        stored = {len(t) for name, t in found.tensors.items() if name.endswith("_b")}
        rank = next((r for r in ranks if r in stored), ranks[0])
        alpha = pattern_values(found, "alpha_pattern", alpha)[0]
    return {"rank": int(rank), "alpha": float(alpha)}


def lycoris_config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    """r and alpha of most sites, and patterns for the others."""
    if any_transposed(deltas):
        raise PlaitError("PEFT knows this method on nn.Linear and convolutions, not on Conv1D.")
    values = {p: (d.options.rank, d.options.scaling * d.options.rank) for p, d in deltas.items()}
    (rank, alpha), _ = Counter(values.values()).most_common(1)[0]
    config: dict[str, Any] = {"r": rank, "alpha": alpha}
    others = sorted((p for p, v in values.items() if v != (rank, alpha)), key=len, reverse=True)
    if others:
        config["rank_pattern"] = {p: values[p][0] for p in others}
        config["alpha_pattern"] = {p: values[p][1] for p in others}
    return config


def partial_reader(keys: Mapping[str, str]) -> Callable[[Delta, PeftSite], None]:
    """A codec's `read` for deltas that have only some of the tensors in `keys`."""

    def read(delta: Delta, found: PeftSite) -> None:
        for own, parameter in delta.named_parameters():
            value = found.tensors.get(keys[own])
            if value is None or value.numel() != parameter.numel():
                got = "missing" if value is None else f"of shape {list(value.shape)}"
                raise FormatError(
                    f"{found.path!r}: {keys[own]} is {got}, but {list(parameter.shape)} is needed."
                )
            parameter.copy_(value.reshape(parameter.shape))

    return read


def partial_writer(keys: Mapping[str, str]) -> Callable[[Delta], dict[str, Tensor]]:
    """A codec's `write` for the same."""
    return lambda delta: {keys[own]: tensor for own, tensor in delta.named_parameters()}


def lycoris_codec(type: str, keys: Mapping[str, str]) -> PeftCodec:
    """The codec of a method that has LycorisConfig's options alone and tensors of PEFT's shapes."""
    return PeftCodec(
        type=type,
        keys=keys,
        options=rank_and_alpha,
        config=lycoris_config,
        read=partial_reader(keys),
        write=partial_writer(keys),
        settings=SETTINGS,
    )
