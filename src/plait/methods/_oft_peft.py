"""OFT in a PEFT folder: the same skew numbers, the other way round where Cayley is exact.

PEFT's exact transform is (I - Q)(I + Q)^-1, the inverse of what its series approximates, so which
of the two made an adapter decides the sign of its numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.adapter import Delta, PeftCodec, PeftSite
from plait.adapter.formats.peft_codec import one_value
from plait.errors import FormatError, PlaitError
from plait.methods._peft_plain import refuse_transposed
from plait.methods._rotations import nearest_divisor

KEY = "oft_R.weight"


def skew_size(numbers: int) -> int:
    """b of a block with b (b - 1) / 2 numbers."""
    return (1 + math.isqrt(1 + 8 * numbers)) // 2


def _options(found: PeftSite) -> dict[str, Any]:
    config = found.config
    size = skew_size(found.tensors[KEY].shape[1]) if found.path else config.get("oft_block_size")
    return {
        "block_size": size or 32,
        "terms": _terms(config),
        "share": bool(config.get("block_share")),
        "radius": config.get("eps", 6e-5) if config.get("coft") else None,
        "block_dropout": config.get("module_dropout") or 0.0,
    }


def _terms(config: Mapping[str, Any]) -> int | None:
    if not config.get("use_cayley_neumann", True):
        return None
    if "peft_version" not in config:
        warnings.warn("PEFT before 0.18 ended OFT's series with another term.", stacklevel=2)
    terms = int(config.get("num_cayley_neumann_terms", 5))
    if terms < 3:
        raise FormatError(f"a series of {terms} terms is not one that Plait has; 3 or more are.")
    return max(terms, 4)  # PEFT makes four of three


def _read(delta: Delta, found: PeftSite) -> None:
    if delta.site.kind == "conv":
        raise FormatError(f"{found.path!r}: PEFT rotates a convolution's overlapping patches.")
    own, theirs = delta.get_parameter("q"), found.tensors[KEY]
    if own.shape != theirs.shape:
        raise FormatError(f"{found.path!r}: {KEY} is {list(theirs.shape)}, not {list(own.shape)}.")
    own.copy_(_sign(delta) * theirs)


def _write(delta: Delta) -> dict[str, Tensor]:
    return {KEY: _sign(delta) * delta.get_parameter("q")}


def _sign(delta: Delta) -> int:
    return -1 if delta.options.terms is None else 1


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    refuse_transposed(deltas, "OFT")
    if any(d.site.kind == "conv" for d in deltas.values()):
        raise PlaitError("PEFT's OFT rotates a convolution's patches and not its weight.")
    terms, radius = one_value(deltas, "terms"), one_value(deltas, "radius")
    config = {
        "oft_block_size": _block_size(deltas),
        "block_share": one_value(deltas, "share"),
        "module_dropout": one_value(deltas, "block_dropout"),
        "use_cayley_neumann": terms is not None,
        "coft": radius is not None,
        # Without it PEFT takes the series for that of its versions before.
        "peft_version": "0.18.0",
    }
    config |= {} if terms is None else {"num_cayley_neumann_terms": terms}
    return config | ({} if radius is None else {"eps": radius})


def _block_size(deltas: Mapping[str, Delta]) -> int:
    """One size from which PEFT, taking the nearest divisor, makes that of every site."""
    sizes = {(d.site.in_features, d.options.blocks(d.site)[1]) for d in deltas.values()}
    for wanted in sorted(
        {size for _, size in sizes} | {d.options.block_size for d in deltas.values()}
    ):
        if all(nearest_divisor(inputs, wanted) == size for inputs, size in sizes):
            return wanted
    raise PlaitError("PEFT has one block size for all sites of OFT, and these need several.")


OFT = PeftCodec(
    type="OFT",
    keys={"q": KEY},
    options=_options,
    config=_config,
    read=_read,
    write=_write,
    settings=(
        "oft_block_size",
        "block_share",
        "module_dropout",
        "use_cayley_neumann",
        "num_cayley_neumann_terms",
        "coft",
        "eps",
    ),
)
