"""What initialisers that write an (A, B) pair ask of a delta."""

from __future__ import annotations

from plait.adapter import Delta, PairDelta
from plait.errors import PlaitError


def require_pair(delta: Delta, initializer: str) -> PairDelta:
    """The delta, if it has a trainable pair of matrices A [..., r, in], B [..., out, r]."""
    if not isinstance(delta, PairDelta) or not delta.pairs():
        raise PlaitError(
            f"initialiser {initializer!r} writes an (A, B) pair, which {type(delta).__name__} at "
            f"{delta.site.path!r} does not train; use it with lora or another method of pairs."
        )
    return delta
