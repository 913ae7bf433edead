"""Who answers which row: several adapters in one pass over the base, each on rows of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from plait.adapter import per_row
from plait.adapter.state import find_state
from plait.errors import PlaitError

Voices = Sequence[str | None]
"""One adapter's name a row; None is the base alone."""


def answering(model: Any, voices: Voices | None) -> contextlib.AbstractContextManager[None]:
    """Within, row i of a batch goes through adapter `voices[i]`; None leaves the model as it is."""
    if voices is None or find_state(model) is None:
        return contextlib.nullcontext()
    return per_row(model, voices)


def can_share(model: Any, name: str | None) -> bool:
    """Whether an adapter can serve single rows (those that change weights for all rows cannot)."""
    try:
        with answering(model, [name]):
            return True
    except PlaitError:
        return False


def repeated(items: Sequence[Any], voices: Voices) -> tuple[list[Any], list[str | None]]:
    """Every item once for every voice, an item's voices together: (items, their voices)."""
    return [item for item in items for _ in voices], [*voices] * len(items)


def by_voice(found: Sequence[Any], count: int) -> list[list[Any]]:
    """What was found for `repeated` items, one list a voice."""
    return [list(found[i::count]) for i in range(count)]


def grouped(chosen: Sequence[int], voices: Voices | None) -> list[int]:
    """A batch's rows with each voice's together, so that an adapter's product is one block."""
    if voices is None:
        return list(chosen)
    return sorted(chosen, key=lambda i: voices[i] or "")
