"""SHiRA in a PEFT folder, where positions are rows and columns in the order of their draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Delta, PeftCodec, PeftSite
from plait.adapter.formats.peft_codec import any_transposed
from plait.errors import FormatError, PlaitError


def _read(delta: Delta, found: PeftSite) -> None:
    rows, columns = found.tensors["shira_indices"].long()
    flat = rows * delta.site.in_features + columns
    values = found.tensors["shira_weight"]
    if len(flat) != len(values) or len(flat) != len(delta.get_parameter("values")):
        raise FormatError(f"{found.path!r} has {len(values)} values at {len(flat)} positions.")
    kind = delta.get_buffer("indices").dtype
    delta.frozen("indices", len(flat), dtype=kind).copy_(flat.sort().values)
    delta.get_parameter("values").copy_(values[flat.argsort()])


def _write(delta: Delta) -> dict[str, Tensor]:
    flat = delta.get_buffer("indices").long()
    columns = delta.site.in_features
    places = torch.stack([flat // columns, flat % columns]).int()
    return {"shira_weight": delta.get_parameter("values"), "shira_indices": places}


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    found = {len(d.get_parameter("values")) / sum(d.site.shape) for d in deltas.values()}
    rank = found.pop()
    if found or rank != int(rank) or any(d.site.kind == "conv" for d in deltas.values()):
        raise PlaitError(
            "PEFT's SHiRA has r (in + out) entries in every linear; attach with rank=."
        )
    return {"r": int(rank), "fan_in_fan_out": any_transposed(deltas)}


PEFT = PeftCodec(
    type="SHIRA",
    keys={"values": "shira_weight", "indices": "shira_indices"},
    options=lambda found: {"rank": found.config["r"]},
    config=_config,
    read=_read,
    write=_write,
)
