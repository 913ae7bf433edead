"""Where bottlenecks beside a transformer's sublayers go, and what they read there."""

from __future__ import annotations

from typing import Literal

from plait.adapter import Traits

Placement = Literal["parallel", "sequential"]
"""parallel: y + block(x), the sublayer's own (layer-normed) input; sequential: y + block(y)."""

FEED_FORWARD = r"(?:.*\.)?(?:mlp|ffn|feed_forward|feedforward)"
"""Feed-forward sublayers by the names that model libraries give them (Pfeiffer's placement)."""


def residual_traits(placement: Placement, zero_start: bool = True) -> Traits:
    """The traits of a block that is not linear, on a module site."""
    parallel = placement == "parallel"
    return Traits(linear_in_x=False, reads_input=parallel, zero_start=zero_start)
