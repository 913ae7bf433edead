"""Tensors stored as codes of a few bits: how a file says so, and how they are read back.

    plait.json       "coded": a list of {"width", "block", "book", "transposed", "dtype",
                     "tensors": {name: shape}}
    "name:codes"     uint8, codes of `width` bits one after another, highest bit first
    "name:scales"    one number for each `block` entries, in the order stored

An entry is book[code] * scale of its block, of the flattened tensor (with `transposed`, of its
transpose). The book stands in the file, so reading knows of no quantiser and needs none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.errors import FormatError

CODES, SCALES = ":codes", ":scales"


@dataclass
class Coded:
    """Tensors that share a code book: what the description says, and the tensors of the file."""

    width: int
    block: int
    book: Sequence[float]
    transposed: bool
    dtype: torch.dtype
    shapes: dict[str, list[int]] = field(default_factory=dict)
    stored: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, shape: Sequence[int], codes: Tensor, scales: Tensor) -> None:
        """One tensor by its codes, flat as stored, and the scales of its blocks."""
        self.shapes[name] = list(shape)
        self.stored[name + CODES] = pack_bits(codes, self.width)
        self.stored[name + SCALES] = scales

    def described(self) -> dict[str, Any]:
        return {
            "width": self.width,
            "block": self.block,
            "book": list(self.book),
            "transposed": self.transposed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tensors": self.shapes,
        }


def pack_bits(codes: Tensor, width: int) -> Tensor:
    """Codes below 2^width as ceil(count * width / 8) bytes, highest bit first; uint8."""
    import numpy as np

    shifts = torch.arange(width - 1, -1, -1)
    bits = (codes.flatten().to(torch.uint8)[:, None] >> shifts.to(torch.uint8)) & 1
    return torch.from_numpy(np.packbits(bits.flatten().numpy()))


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """The first `count` codes of `pack_bits`, uint8."""
    import numpy as np

    bits = torch.from_numpy(np.unpackbits(packed.numpy(), count=count * width))
    places = 2 ** torch.arange(width - 1, -1, -1, dtype=torch.uint8)
    return (bits.unflatten(0, (count, width)) * places).sum(1, dtype=torch.uint8)


def decode_tensors(groups: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors with every coded one decoded under its own name.

    Raises FormatError for a description that does not fit what is stored.
    """
    found = dict(tensors)
    if not isinstance(groups, list):
        raise FormatError("'coded' must be a list.")
    for group in groups:
        for name, shape in group["tensors"].items():
            codes, scales = found.pop(name + CODES, None), found.pop(name + SCALES, None)
            if codes is None or scales is None:
                raise FormatError(f"the codes or scales of {name!r} are missing.")
            found[name] = _decode(name, shape, codes, scales, group)
    return found


def _decode(
    name: str, shape: Any, codes: Tensor, scales: Tensor, group: Mapping[str, Any]
) -> Tensor:
    width, block = group["width"], group["block"]
    dtype = getattr(torch, str(group["dtype"]), None)
    whole = [width, block, *shape]
    if not all(type(n) is int and n >= 0 for n in whole) or not 1 <= width <= 8 or block < 1:
        raise FormatError(f"{name!r} is coded with width {width!r} and block {block!r}.")
    count = int(torch.Size(shape).numel())
    fits = codes.dtype == torch.uint8 and codes.shape == (-(-count * width // 8),)
    if not fits or scales.shape != (-(-count // block),) or not scales.is_floating_point():
        raise FormatError(f"the codes of {name!r} are not those of a tensor {shape}.")
    book = torch.tensor(group["book"], dtype=torch.float32)
    if book.shape != (2**width,) or not isinstance(dtype, torch.dtype):
        raise FormatError(f"{name!r} is coded with a book of {len(book)} entries as {dtype}.")
    unit = F.pad(book[unpack_bits(codes, width, count).int()], (0, -count % block))
    flat = (unit.unflatten(0, (-1, block)) * scales.float()[:, None]).flatten()[:count].to(dtype)
    if not group["transposed"]:
        return flat.reshape(shape)
    return flat.reshape(*shape[:-2], shape[-1], shape[-2]).mT.contiguous()
