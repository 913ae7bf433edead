"""KaSA in PEFT's folders: LoRA's tensors, `lora_diag`, and a cut that PEFT makes anew from W."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from plait.adapter import Delta, PeftSite
from plait.adapter.formats.peft_codec import NOT_OURS, one_value, pair_codec
from plait.adapter.site import LinearSite
from plait.errors import PlaitError

_PAIR = pair_codec(
    marks={"use_dora": False},
    vectors={"e": "lora_diag"},
    more=lambda config: dict(config["kasa_config"]),
)


def _read(delta: Delta, found: PeftSite) -> None:
    assert _PAIR.read is not None
    _PAIR.read(delta, found)
    cast(Any, delta).cut()


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    if not one_value(deltas, "truncate"):
        raise PlaitError("PEFT's KaSA always cuts W; save in Plait's format.")
    for path, delta in deltas.items():
        if type(delta.site) is not LinearSite:
            raise PlaitError(f"PEFT has KaSA on nn.Linear only, which {path!r} is not.")
    weights = {name: one_value(deltas, name) for name in ("beta", "gamma")}
    return _PAIR.config(deltas) | {"kasa_config": weights}


CODEC = dataclasses.replace(
    _PAIR,
    read=_read,
    config=_config,
    accepts=lambda config: bool(config.get("kasa_config")) and not config.get("use_dora"),
    required={k: v for k, v in NOT_OURS.items() if k != "kasa_config"},
    settings=("kasa_config",),
)
