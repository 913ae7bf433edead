"""Parts of parameters that a step leaves as they are, under any optimiser, bit for bit.

A gradient of 0 does not hold an entry still: momentum and decay go on moving it. So the parts are
copied before the optimiser moves, with what it remembers of them, and put back afterwards: for them
the step has not been.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Held:
    """`outside` before the optimiser's step, `put_back` after it."""

    def __init__(self) -> None:
        self._kept: list[tuple[nn.Parameter, int, tuple[int, int], dict[Any, list[Tensor]]]] = []

    @torch.no_grad()
    def outside(
        self, parameter: nn.Parameter, axis: int, first: int, last: int, optimizer: Any
    ) -> None:
        """Hold all slices of `parameter` along `axis` but those from `first` to `last` - 1."""
        span = (first, last)
        kept = {
            key: [part.clone() for part in _outside(tensor, axis, span)]
            for key, tensor in _tensors(parameter, optimizer).items()
        }
        self._kept.append((parameter, axis, span, kept))

    @torch.no_grad()
    def put_back(self, optimizer: Any) -> None:
        for parameter, axis, span, kept in self._kept:
            for key, tensor in _tensors(parameter, optimizer).items():
                before = kept.get(key)
                for i, part in enumerate(_outside(tensor, axis, span)):
                    # What the optimiser began to remember in this step was 0 until then.
                    part.copy_(before[i]) if before is not None else part.zero_()
        self._kept = []


_ITSELF = object()


def _tensors(parameter: nn.Parameter, optimizer: Any) -> dict[Any, Tensor]:
    """The parameter and every entry of its optimiser state that has its shape."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    found: dict[Any, Tensor] = {_ITSELF: parameter.data}
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            found[key] = value
    return found


def _outside(tensor: Tensor, axis: int, span: tuple[int, int]) -> list[Tensor]:
    first, last = span
    after = tensor.narrow(axis, last, tensor.shape[axis] - last)
    return [part for part in (tensor.narrow(axis, 0, first), after) if part.numel()]
