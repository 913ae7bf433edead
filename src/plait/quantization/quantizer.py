"""`Quantizer`: what code that cares about quantisation errors needs to know of a quantiser."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Quantizer(Protocol):
    """Anything that says what a weight becomes.

    Weights come in canonical orientation [..., out, in]; a quantiser whose blocks run along what
    the module stores must transpose for modules that store W as [in, out].
    """

    @property
    def bits(self) -> float:
        """Bits it spends on one weight, scales included."""
        ...

    def quantize(self, weight: Tensor) -> Tensor:
        """`weight` as it reads back after it was stored: same shape, dtype and device."""
        ...
