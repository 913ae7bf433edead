"""HiRA in a PEFT folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.adapter import Delta, PeftCodec, PeftSite
from plait.adapter.formats.peft_codec import any_transposed, one_value

LINEAR, EMBEDDING = ("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B")


def _options(found: PeftSite) -> dict[str, Any]:
    stored = next((found.tensors[n] for n in ("hira_A", EMBEDDING[0]) if n in found.tensors), None)
    rank = found.config["r"] if stored is None else len(stored)
    return {"rank": rank, "dropout": found.config.get("hira_dropout") or 0.0}


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    return {
        "r": one_value(deltas, "rank"),  # PEFT's rank_pattern has no effect here
        "hira_dropout": one_value(deltas, "dropout"),
        "fan_in_fan_out": any_transposed(deltas),
    }


def _read(delta: Delta, found: PeftSite) -> None:
    names = EMBEDDING if delta.site.kind == "embedding" else LINEAR
    for own, theirs in zip("AB", names, strict=True):
        delta.get_parameter(own).copy_(found.tensors[theirs].flatten(1))


def _write(delta: Delta) -> dict[str, Tensor]:
    A, B = (dict(delta.own_tensors())[name] for name in "AB")
    if delta.site.kind == "conv":
        kernel = delta.site.details["kernel"]
        A, B = A.reshape(-1, *kernel), B.reshape(*B.shape, *[1] * (len(kernel) - 1))
    names = EMBEDDING if delta.site.kind == "embedding" else LINEAR
    return dict(zip(names, (A, B), strict=True))


PEFT = PeftCodec(
    type="HIRA",
    keys={name: name for name in (*LINEAR, *EMBEDDING)},
    options=_options,
    config=_config,
    read=_read,
    write=_write,
    settings=("hira_dropout",),
)
