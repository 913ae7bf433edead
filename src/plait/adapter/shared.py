"""The tensors that several deltas of one adapter read: owned once, saved once.

Trainable pools (MoS, hypernetworks) are saved; frozen random bases (VeRA, RandLoRA) are
regenerated from the adapter's seed. Deltas keep a reference to this module and look a tensor up at
each use, so that whatever replaces parameters (FSDP2, `.to()`) is seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import seeds
from plait.errors import PlaitError


class SharedTensors(nn.Module):
    """One adapter's registry of shared tensors."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.seed, self.dtype, self.device = seed, dtype, device
        self.notes: dict[str, Any] = {}
        """Plain facts that `Delta.prepare` leaves for the deltas (a site's place in a table)."""

    def pool(self, name: str, shape: tuple[int, ...], start: str | None = None) -> None:
        """A trainable tensor, zero or drawn from the distribution `start`."""
        self._refuse_twice(name)
        value = torch.zeros(shape) if start is None else self._draw(name, shape, start)
        self.register_parameter(name, nn.Parameter(value.to(self.device, self.dtype)))

    def frozen(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        """A frozen tensor regenerated from the seed; never saved."""
        self._refuse_twice(name)
        value = self._draw(name, shape, kind).to(self.device, self.dtype)
        self.register_buffer(name, value, persistent=False)

    def keep(self, name: str, value: Tensor) -> None:
        """A frozen tensor that is saved: one that came from elsewhere and no seed can make."""
        self.register_buffer(name, value)

    def _draw(self, name: str, shape: tuple[int, ...], kind: str) -> Tensor:
        return seeds.draw(kind, shape, self.seed, "shared", name)

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, name)

    def __contains__(self, name: str) -> bool:
        return name in self._parameters or name in self._buffers

    def seeded(self) -> dict[str, Tensor]:
        """The regenerated tensors, for checksums."""
        drawn = self._non_persistent_buffers_set
        return {n: b for n, b in self._buffers.items() if b is not None and n in drawn}

    def _refuse_twice(self, name: str) -> None:
        if name in self:
            raise PlaitError(f"shared tensor {name!r} is registered twice.")
