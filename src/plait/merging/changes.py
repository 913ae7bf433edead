"""`Changes`: what k inputs change at one site, as factors or as rows made when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank, key_of, uniform_at

BLOCK = 1 << 18
"""Numbers that a block of rows may hold over all inputs: 1 MB in float32, which stays in a cache
through the dozen passes that an election makes over it."""


@dataclass(frozen=True, eq=False)
class Changes:
    """The changes dW_1 .. dW_k [out, in] of one site.

    `lows` holds exact factors, `dense` the matrices themselves (mapped from a file, perhaps), from
    which `base` is subtracted as they are read; one of the two is given. A vector (a bias, a norm)
    is a matrix of one row. `original` is W0 [out, in] of the site, for methods that read it, where
    `base` does not hold it already. `statistics` holds what data said about this site, a tensor for
    each input or None. In space `aligned` the matrices are coordinates, and `basis` [out, p] what
    they are coordinates in.
    """

    path: str
    lows: Sequence[LowRank] | None = None
    dense: Sequence[Tensor] | None = None
    base: Tensor | None = field(default=None, repr=False)
    original: Tensor | None = field(default=None, repr=False)
    seed: int = 0
    block: int = field(default=BLOCK, repr=False)
    statistics: Sequence[Tensor | None] | None = field(default=None, repr=False)
    basis: Tensor | None = field(default=None, repr=False)

    @cached_property
    def shape(self) -> tuple[int, int]:
        rows, columns = (self.lows or self.dense or ())[0].shape[-2:]
        return int(rows), int(columns)

    @property
    def k(self) -> int:
        return len(self.lows if self.lows is not None else self.dense or ())

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic: the widest of the inputs', float32 at least."""
        found = torch.float32
        for item in self.lows if self.lows is not None else self.dense or ():
            found = torch.promote_types(found, item.dtype)
        return found

    def known(self, kind: str) -> list[Tensor]:
        """Every input's statistic, in this site's dtype; an error names the one that is missing."""
        found = self.statistics or [None] * self.k
        for number, item in enumerate(found, 1):
            if item is None:
                raise PlaitError(
                    f"site {self.path!r}: input {number} has no {kind} statistic there; compute it "
                    "with plait.merging.statistics and pass merge(..., statistics=[...])."
                )
        return [_in(item, self.dtype) for item in found if item is not None]

    def base_weight(self, rows: range | None = None) -> Tensor:
        """W0 of the site (of these rows), in this site's dtype; an error where nobody gave it.

        For methods that declare `reads_base`. Vectors come as one row, as their changes do.
        """
        found = self.base if self.original is None else self.original
        if found is None:
            raise PlaitError(
                f"site {self.path!r}: this merge reads the base's weight, which is not known here; "
                "pass merge(..., base=model or folder), or attach the adapters."
            )
        return (found if rows is None else found[rows.start : rows.stop]).to("cpu", self.dtype)

    def rows(self, rows: range) -> Tensor:
        """These rows of every change, [k, rows, in]."""
        cut = slice(rows.start, rows.stop)
        if self.lows is not None:
            return torch.stack([low.rows(cut).dense(self.dtype) for low in self.lows])
        found = torch.stack([matrix[cut].to(self.dtype) for matrix in self.dense or ()])
        return found if self.base is None else found.sub_(self.base[cut].to(self.dtype))

    def whole(self, index: int) -> Tensor:
        """All of one input's change, [out, in]."""
        if self.lows is not None:
            return self.lows[index].dense(self.dtype)
        matrix = (self.dense or ())[index]
        if self.base is None:
            return matrix.to(self.dtype)
        # The base is widened in passing: a copy of it would cost as much as the difference.
        return matrix.to(self.dtype, copy=True).sub_(self.base)

    def ranges(self) -> list[range]:
        """The rows in blocks of at most `block` numbers (at least one row)."""
        out, columns = self.shape
        step = max(1, self.block // max(1, self.k * columns))
        return [range(at, min(at + step, out)) for at in range(0, out, step)]

    def blocks(self) -> Iterator[Tensor]:
        """All rows, block by block: [k, rows, in]."""
        return (self.rows(rows) for rows in self.ranges())

    def uniform(self, name: str, rows: range) -> Tensor:
        """Random numbers in [0, 1) for these rows of every input, [k, rows, in].

        They depend on the seed, the site, the input's place and the position, on nothing else.
        """
        columns = self.shape[1]
        keys = [key_of(self.seed, self.path, name, i) for i in range(self.k)]
        return torch.stack([uniform_at(key, rows, columns) for key in keys])


def _in(statistic: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU, numbers in this dtype; masks stay what they are."""
    return statistic.to("cpu", dtype if statistic.is_floating_point() else None)
