"""BOFT in a PEFT folder, where blocks are full matrices of which only the skew part counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Delta, PeftCodec, PeftSite
from plait.adapter.formats.peft_codec import one_value
from plait.errors import FormatError, PlaitError
from plait.methods._peft_plain import refuse_transposed
from plait.methods._rotations import skew

ROTATION, SCALE = "boft_R", "boft_s"


def _options(found: PeftSite) -> dict[str, Any]:
    config = found.config
    size = config.get("boft_block_size") or 4  # 0 where the number of blocks was asked for
    factors = config.get("boft_n_butterfly_factor", 1)
    if found.path:
        # PEFT falls back to a single factor where it cannot compile its extension.
        factors, _, size, _ = found.tensors[ROTATION].shape
    return {
        "block_size": size,
        "factors": factors,
        "block_dropout": config.get("boft_dropout") or 0.0,
    }


def _read(delta: Delta, found: PeftSite) -> None:
    data, q = found.tensors[ROTATION], delta.get_parameter("q")
    size = data.shape[-1]
    if data.shape != (*q.shape[:2], size, size) or size * (size - 1) != 2 * q.shape[2]:
        raise FormatError(
            f"{found.path!r}: {ROTATION} is {list(data.shape)}, for q {list(q.shape)}."
        )
    rows, columns = torch.triu_indices(size, size, 1)
    # PEFT's transform is the inverse of ours: (I - Q)(I + Q)^-1.
    q.copy_((data.mT - data)[..., rows, columns] / 2)
    delta.get_parameter("s").copy_(found.tensors[SCALE].flatten())


def _write(delta: Delta) -> dict[str, Tensor]:
    scale = delta.get_parameter("s")
    along = (1, -1) if delta.site.kind == "conv" else (-1, 1)
    size = delta.options.shape(delta.site)[2]
    rotation = -skew(delta.get_parameter("q"), size)
    return {ROTATION: rotation, SCALE: scale.reshape(along)}


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    refuse_transposed(deltas, "BOFT")
    shapes = {(m, size) for m, _, size in (d.options.shape(d.site) for d in deltas.values())}
    if len(shapes) > 1:
        raise PlaitError("PEFT's BOFT has one block size and number of factors for all sites.")
    ((factors, size),) = shapes
    return {
        "boft_block_size": size,
        "boft_block_num": 0,
        "boft_n_butterfly_factor": factors,
        "boft_dropout": one_value(deltas, "block_dropout"),
    }


BOFT = PeftCodec(
    type="BOFT",
    keys={"q": ROTATION, "s": SCALE},
    options=_options,
    config=_config,
    read=_read,
    write=_write,
    settings=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"),
)
