"""A ceiling on what a file may make us allocate.

Methods compute their shapes from options, and options come from files. While a file is being read,
every allocation is counted before it happens, so that an absurd rank is an error and not a machine
that swaps to death.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from plait.errors import FormatError

UNSTORED = 4 * 2**30
"""Bytes an adapter may allocate beyond a multiple of what its file stores (seeded bases)."""

_FACTORIES = {"empty", "zeros", "ones", "full", "randn", "rand", "eye", "randperm", "arange"}


def limit_allocation(
    described: Mapping[str, Any], tensors: Mapping[str, Tensor], what: str
) -> contextlib.AbstractContextManager[Any]:
    """A guard for building what `described` (a plait.json) asks for, given what its file stores.

    Counting costs some 30 microseconds an allocation, so it is left out where no product of two
    options with the sites' sizes comes near the limit.
    """
    limit = 8 * sum(t.nbytes for t in tensors.values()) + UNSTORED
    options = [described.get("options")]
    sites = [s for s in described.get("sites", []) if isinstance(s, dict)]
    options += [s.get("options") for s in sites]
    sizes = sum(n for s in sites for n in _integers(s.get("shape")))
    largest = max((n for o in options for n in _integers(o)), default=1)
    if 8 * largest**2 * sizes < limit:
        return contextlib.nullcontext()
    return AllocationLimit(limit, what)


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _integers(item)
    elif isinstance(value, int):
        yield abs(value)


class AllocationLimit(TorchDispatchMode):
    """Refuses to let torch allocate more than `limit` bytes in total within the block."""

    def __init__(self, limit: int, what: str) -> None:
        super().__init__()
        self.left, self.what = limit, what

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _FACTORIES and args:
            size = args[0] if isinstance(args[0], list | tuple) else args[:1]
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            self._count(math.prod(int(s) for s in size) * dtype.itemsize, size)
        return func(*args, **kwargs)

    def _count(self, needed: int, size: Any) -> None:
        self.left -= needed
        if self.left < 0:
            raise FormatError(
                f"{self.what}: its options ask for a tensor of shape {[int(s) for s in size]}, out "
                "of all proportion to what the file stores; the description is damaged or hostile."
            )
