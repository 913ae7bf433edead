"""Parts of parameters that a step leaves as they are, under any optimiser, bit for bit.

A gradient of 0 does not hold an entry still: momentum and decay go on moving it. So everything is
copied before the optimiser moves, what it remembers included, and all but the parts that may move
is put back afterwards: for the rest the step has not been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moving:
    """The slices first to last - 1 of a parameter along an axis: what the step may change."""

    parameter: nn.Parameter
    axis: int
    first: int
    last: int


class Held:
    """`take` before the optimiser's step, `put_back` after it.

    The copies, as large as the parameters and their moments, stay for the next step.
    """

    def __init__(self) -> None:
        self._moving: Sequence[Moving] = ()
        self._copies: dict[tuple[int, Any], Tensor] = {}
        self._taken: set[tuple[int, Any]] = set()

    @torch.no_grad()
    def take(self, moving: Sequence[Moving], optimizer: Any) -> None:
        self._moving = moving
        live = {key: tensor for key, _, tensor in self._tensors(optimizer)}
        for key, tensor in live.items():
            old = self._copies.get(key)
            if old is None or _kind(old) != _kind(tensor):
                self._copies[key] = torch.empty_like(tensor)
        self._taken = set(live)
        torch._foreach_copy_([self._copies[key] for key in live], list(live.values()))

    @torch.no_grad()
    def put_back(self, optimizer: Any) -> None:
        found = self._tensors(optimizer)
        parts = [tensor.narrow(m.axis, m.first, m.last - m.first) for _, m, tensor in found]
        moved = [part.clone() for part in parts]
        for key, _, tensor in found:
            # What the optimiser began to remember in this step was 0 until then.
            if key not in self._taken:
                self._copies[key] = torch.zeros_like(tensor)
        if found:
            torch._foreach_copy_([t for *_, t in found], [self._copies[key] for key, *_ in found])
            torch._foreach_copy_(parts, moved)
        self._moving = ()

    def _tensors(self, optimizer: Any) -> list[tuple[tuple[int, Any], Moving, Tensor]]:
        """Every parameter, and all of its optimiser state that has its shape."""
        state = getattr(optimizer, "optimizer", optimizer).state
        found = []
        for index, m in enumerate(self._moving):
            found.append(((index, None), m, m.parameter.data))
            for key, value in state.get(m.parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == m.parameter.shape:
                    found.append(((index, key), m, value))
        return found


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
