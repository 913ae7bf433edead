"""`Trials`: every point that a search asked about, with the answer, in a file that it resumes from.

A search is deterministic given the answers, so resuming is replaying: points that the file knows
are answered from it, and the model is only asked about new ones. One JSON object a line; a line
that was cut off when the process died is asked again. A line without a "point" says which search
the lines below it belong to: searches of several stages write one for each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from plait.adapter.formats.atomic import text_writer, write_file
from plait.errors import PlaitError

Answer = dict[str, Any]
Section = tuple[dict[str, Any], list[Answer]]
"""What makes a search this one, and what it asked."""


@dataclass(frozen=True)
class Log:
    """Where a search keeps what it asked, and whether a bar on stderr shows it."""

    file: str | os.PathLike[str] | None = None
    progress: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    """More that makes this search this one (data, base): a file of others is refused."""
    stage: int = 0

    def next(self, stages: int = 1) -> Log:
        """For a later stage of the search: the same file, below."""
        return replace(self, stage=self.stage + stages)

    @contextmanager
    def open(self, search: dict[str, Any], total: int, label: str) -> Iterator[Trials]:
        """The trials of this stage; `search` and `self.facts` must be those of the file."""
        known = json.loads(json.dumps(dict(self.facts) | search))
        if not self.progress:
            yield Trials(self.file, known, self.stage)
            return
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total)

            def advance(entry: Answer) -> None:
                value = entry.get("value")
                shown = label if value is None else f"{label}  {value:.4g}"
                bar.update(task, advance=1, description=shown)

            yield Trials(self.file, known, self.stage, advance)


Place = Log | str | os.PathLike[str] | None
"""A log, or the file of one."""


def as_log(place: Place) -> Log:
    return place if isinstance(place, Log) else Log(place)


class Trials:
    """Calls are numbered; `self.history` holds {"point": ..., and the answer} of each."""

    def __init__(
        self,
        file: str | os.PathLike[str] | None,
        search: dict[str, Any],
        stage: int = 0,
        advance: Any = None,
    ) -> None:
        self.history: list[Answer] = []
        self._advance, self._stage = advance, stage
        self._file = None if file is None else Path(file)
        self._sections: list[Section] = [] if self._file is None else _read(self._file)
        self._past = [] if self._file is None else self._open(search)
        self.asked = 0

    def _open(self, search: dict[str, Any]) -> list[Answer]:
        if len(self._sections) < self._stage:
            raise PlaitError(f"{self._file} lacks an earlier stage; remove it to search anew.")
        if len(self._sections) == self._stage:
            self._sections.append((search, []))
        known, past = self._sections[self._stage]
        if known != search:
            keys = known.keys() | search.keys()
            other = sorted(k for k in keys if known.get(k) != search.get(k))
            raise PlaitError(
                f"{self._file} belongs to another search ({', '.join(other)} differ); give another "
                "place, or remove it."
            )
        self._write(self._sections)
        return past

    def _write(self, sections: list[Section]) -> None:
        assert self._file is not None
        lines = [json.dumps(x) + "\n" for search, entries in sections for x in (search, *entries)]
        write_file(self._file, text_writer("".join(lines)))

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
            self._append(entry)
        self.history.append(entry)
        if self._advance is not None:
            self._advance(entry)
        return entry

    def _append(self, entry: Answer) -> None:
        if self._file is None:
            return
        if len(self._sections) > self._stage + 1:  # an earlier stage goes on: later ones are stale
            del self._sections[self._stage + 1 :]
            self._write([*self._sections[: self._stage], (self._sections[-1][0], self.history)])
        with self._file.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _read(file: Path) -> list[Section]:
    lines = file.read_text().split("\n") if file.is_file() else []
    found = [_parsed(line) for line in lines if line]
    if found and found[-1] is None:
        found.pop()
    if any(item is None for item in found) or (found and "point" in found[0]):  # type: ignore[operator]
        raise PlaitError(f"{file} is damaged; remove it to search anew.")
    sections: list[Section] = []
    for item in found:
        assert item is not None
        if "point" in item:
            sections[-1][1].append(item)
        else:
            sections.append((item, []))
    return sections


def _parsed(line: str) -> Answer | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
