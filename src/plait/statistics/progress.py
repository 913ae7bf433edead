"""A progress bar that appears only where a pass turns out to be long."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack
from typing import Any

SHOW_AFTER = 2.0
"""Seconds before the bar appears; quick passes stay silent."""


def track(batches: Iterable[Any], label: str) -> Iterator[Any]:
    """Yield `batches`, with a bar on standard error if it is a terminal and this takes long."""
    if not sys.stderr.isatty():
        yield from batches
        return
    total = len(batches) if isinstance(batches, Sized) else None
    started = time.monotonic()
    advance = None
    with ExitStack() as stack:
        for done, batch in enumerate(batches):
            if advance is None and time.monotonic() - started > SHOW_AFTER:
                advance = _open(stack, label, total)
            if advance is not None:
                advance(done)
            yield batch


def _open(stack: ExitStack, label: str, total: int | None) -> Any:
    from rich.console import Console
    from rich.progress import Progress

    bar = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
    task = bar.add_task(label, total=total)
    return lambda done: bar.update(task, completed=done)
