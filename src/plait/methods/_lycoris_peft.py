"""PEFT's form of methods whose sites have different tensors: LoHa and LoKr, and GraLoRA.

Ranks and scales of LoHa and LoKr may differ by site (`rank_pattern`, `alpha_pattern`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from plait.adapter import Delta, PeftCodec, PeftSite
from plait.adapter.formats.peft_codec import any_transposed, one_value, pattern_values
from plait.errors import FormatError, PlaitError

DROPOUTS = ("rank_dropout", "module_dropout", "rank_dropout_scale")
SETTINGS = ("alpha", *DROPOUTS, "use_effective_conv2d")
"""Keys of LycorisConfig beside those of every type; the dropouts act in training alone."""


def lycoris_options(found: PeftSite) -> dict[str, Any]:
    """The options at a site (of the adapter, where the path is empty) that both types have."""
    rank, alpha = found.config.get("r", 8), found.config.get("alpha", 8)
    if found.path:
        ranks = pattern_values(found, "rank_pattern", rank)
        # PEFT sorts the patterns when it saves them, which may put another match first.
        stored = {len(t) for name, t in found.tensors.items() if name.endswith(("_b", "t2"))}
        rank = next((r for r in ranks if r in stored), ranks[0])
        alpha = pattern_values(found, "alpha_pattern", alpha)[0]
    tucker = bool(found.config.get("use_effective_conv2d"))
    return {"rank": int(rank), "alpha": float(alpha), "tucker": tucker}


def lycoris_config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    """r and alpha of most sites, and patterns for the others."""
    if any_transposed(deltas):
        raise PlaitError("PEFT knows this method on nn.Linear and convolutions, not on Conv1D.")
    values = {p: (d.options.rank, d.options.scaling * d.options.rank) for p, d in deltas.items()}
    (rank, alpha), _ = Counter(values.values()).most_common(1)[0]
    config: dict[str, Any] = {"r": rank, "alpha": alpha}
    config["use_effective_conv2d"] = one_value(deltas, "tucker")
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

    def write(delta: Delta) -> dict[str, Tensor]:
        named = delta.named_parameters()
        # A core over one dimension gets a second of size 1 there.
        return {
            keys[n]: p[..., None] if n in ("t1", "t2") and p.dim() == 3 else p for n, p in named
        }

    return write


def lycoris_codec(type: str, keys: Mapping[str, str]) -> PeftCodec:
    """The codec of a method that has LycorisConfig's options alone and tensors of PEFT's shapes."""
    return PeftCodec(
        type=type,
        keys=keys,
        options=lycoris_options,
        config=lycoris_config,
        read=partial_reader(keys),
        write=partial_writer(keys),
        settings=SETTINGS,
    )
