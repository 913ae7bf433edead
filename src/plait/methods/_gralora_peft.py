"""GraLoRA in PEFT's folders; its tensors have PEFT's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.adapter import Delta, PeftCodec, PeftSite, Site
from plait.adapter.formats.peft_codec import any_transposed, one_value
from plait.adapter.site import LinearSite
from plait.methods._lycoris_peft import partial_reader, partial_writer

KEYS = {
    "A": "gralora_A",
    "B": "gralora_B",
    "A_all": "gralora_A_general.weight",
    "B_all": "gralora_B_general.weight",
}


def _options(found: PeftSite) -> dict[str, Any]:
    ours = {"rank": "r", "k": "gralora_k", "hybrid_rank": "hybrid_r", "dropout": "gralora_dropout"}
    given = {name: found.config[key] for name, key in ours.items() if key in found.config}
    return given | {"alpha": float(found.config["alpha"])}


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    rank, hybrid = one_value(deltas, "rank"), one_value(deltas, "hybrid_rank")
    return {
        "r": rank,
        "hybrid_r": hybrid,
        "gralora_k": one_value(deltas, "k"),
        "alpha": one_value(deltas, "scaling") * (rank + hybrid),
        "gralora_dropout": one_value(deltas, "dropout"),
        "fan_in_fan_out": any_transposed(deltas),
    }


def _site(found: PeftSite) -> Site:
    A, B = found.tensors[KEYS["A"]], found.tensors[KEYS["B"]]
    return LinearSite(found.path, (len(B) * B.shape[2], len(A) * A.shape[1]))


GRALORA_CODEC = PeftCodec(
    type="GRALORA",
    keys=KEYS,
    options=_options,
    config=_config,
    site=_site,
    read=partial_reader(KEYS),
    write=partial_writer(KEYS),
    settings=("alpha", "gralora_k", "hybrid_r", "gralora_dropout"),
)
