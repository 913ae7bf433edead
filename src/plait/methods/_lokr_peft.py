"""LoKr in PEFT's folders: a full w2 of a convolution keeps the kernel's axes there.

Not in one dimension: PEFT multiplies that w2, of three axes, to w1 along other ones, which gives
another family of changes. It is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.adapter import Delta, PeftCodec, PeftSite, Site
from plait.adapter.formats.peft_codec import one_value
from plait.adapter.site import ConvSite, LinearSite
from plait.errors import PlaitError
from plait.methods._lycoris_peft import (
    SETTINGS,
    lycoris_config,
    lycoris_options,
    partial_reader,
    partial_writer,
)

KEYS = {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}


def _options(found: PeftSite) -> dict[str, Any]:
    return lycoris_options(found) | {
        "factor": found.config.get("decompose_factor", -1),
        "decompose_both": bool(found.config.get("decompose_both")),
    }


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    return lycoris_config(deltas) | {
        "decompose_factor": one_value(deltas, "factor"),
        "decompose_both": one_value(deltas, "decompose_both"),
    }


def _write(delta: Delta) -> dict[str, Tensor]:
    tensors = partial_writer(KEYS)(delta)
    if delta.site.kind == "conv" and "lokr_w2" in tensors:
        _refuse_one_dimension(delta)
        kernel, w2 = delta.site.details["kernel"], tensors["lokr_w2"]
        tensors["lokr_w2"] = w2.reshape(w2.shape[0], -1, *kernel[1:])
    return tensors


def _read(delta: Delta, found: PeftSite) -> None:
    if delta.site.kind == "conv" and "lokr_w2" in found.tensors:
        _refuse_one_dimension(delta)
    partial_reader(KEYS)(delta, found)


def _refuse_one_dimension(delta: Delta) -> None:
    if len(delta.site.details["kernel"]) == 2:
        raise PlaitError(
            f"PEFT's LoKr with a full w2 is another change on the one-dimensional convolution "
            f"{delta.site.path!r}; use a rank below half of w2's longer side, or Plait's format."
        )


def _site(found: PeftSite) -> Site | None:
    """The site of a full w2; a low-rank one may be a linear layer's or a convolution's."""
    if "lokr_w2" not in found.tensors:
        return None
    w2 = found.tensors["lokr_w2"]
    o1, i1 = _sizes(found.tensors)
    rows, channels, kernel = o1 * w2.shape[0], i1 * w2.shape[1], tuple(w2.shape[2:])
    if not kernel:
        return LinearSite(found.path, (rows, channels))
    shape = (rows, channels * math.prod(kernel))
    return ConvSite(found.path, shape, None, {"kernel": (channels, *kernel)})


def _sizes(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    if "lokr_w1" in tensors:
        rows, columns = tensors["lokr_w1"].shape
        return rows, columns
    return tensors["lokr_w1_a"].shape[0], tensors["lokr_w1_b"].shape[1]


LOKR_CODEC = PeftCodec(
    type="LOKR",
    keys=KEYS,
    options=_options,
    config=_config,
    site=_site,
    read=_read,
    write=_write,
    settings=(*SETTINGS, "decompose_factor", "decompose_both"),
)
