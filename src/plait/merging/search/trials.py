"""`Trials`: every point that a search asked about, with the answer, in a file that it resumes from.

A search is deterministic given the answers, so resuming is replaying: points that the file knows
are answered from it, and the model is only asked about new ones. One JSON object a line; a line
that was cut off when the process died is asked again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from plait.errors import PlaitError

Answer = dict[str, Any]


class Trials:
    """Calls are numbered; `self.history` holds {"point": ..., and the answer} of each."""

    def __init__(
        self, file: str | os.PathLike[str] | None, search: dict[str, Any], advance: Any = None
    ) -> None:
        self.history: list[Answer] = []
        self._advance = advance
        self._file = None if file is None else Path(file)
        self._past = [] if self._file is None else self._open(json.loads(json.dumps(search)))
        self.asked = 0

    def _open(self, search: dict[str, Any]) -> list[Answer]:
        assert self._file is not None
        lines = self._file.read_text().split("\n") if self._file.is_file() else []
        found = [_parsed(line) for line in lines if line]
        if found and found[-1] is None:
            found.pop()
        if any(item is None for item in found):
            raise PlaitError(f"{self._file} is damaged; remove it to search anew.")
        if found and found[0] != search:
            raise PlaitError(f"{self._file} belongs to another search; give another log.")
        kept = [search, *(item for item in found[1:] if item is not None)]
        made = self._file.with_name(self._file.name + ".made")
        made.write_text("".join(json.dumps(item) + "\n" for item in kept))
        os.replace(made, self._file)
        return kept[1:]

    def __call__(self, point: Tensor, ask: Callable[[], Answer]) -> Answer:
        """The answer at `point`: from the file when it was asked there before, else of `ask()`."""
        place, here = len(self.history), point.tolist()
        if place < len(self._past):
            entry = self._past[place]
            if entry["point"] != here:
                raise PlaitError(
                    f"{self._file} has another point as number {place + 1}: the model, its "
                    "adapters, the data or the options differ; give another log."
                )
        else:
            entry = {"point": here, **ask()}
            self.asked += 1
            if self._file is not None:
                with self._file.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
        self.history.append(entry)
        if self._advance is not None:
            self._advance(entry)
        return entry


def _parsed(line: str) -> Answer | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


@contextmanager
def open_trials(
    file: str | os.PathLike[str] | None,
    search: dict[str, Any],
    total: int,
    label: str,
    progress: bool,
) -> Iterator[Trials]:
    """Trials with a bar on stderr if one is wanted."""
    if not progress:
        yield Trials(file, search)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)

        def advance(entry: Answer) -> None:
            value = entry.get("value")
            shown = label if value is None else f"{label}  {value:.4g}"
            bar.update(task, advance=1, description=shown)

        yield Trials(file, search, advance)
