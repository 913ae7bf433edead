"""Reading rows from files and from sequences of dicts, one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from plait.errors import FormatError
from plait.training.data.example import Example, parse_row

MAX_LINE_BYTES = 64 * 2**20


def read_jsonl(
    path: str | os.PathLike[str], max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Example]:
    """The examples of a JSON-lines file, read as they are asked for; blank lines are skipped.

    FormatError names the file and the 1-based line: a line that is no JSON, no UTF-8, longer than
    `max_line_bytes` or of no known form, and a file without rows. FileNotFoundError when missing.
    """
    path = Path(path)
    if path.is_dir():
        raise FormatError(f"{path} is a directory; give a .jsonl file in it")
    empty = True
    with path.open("rb") as stream:
        for number, line in _lines(stream, path, max_line_bytes):
            empty = False
            origin = f"{path}:{number}"
            yield parse_row(_load(line, origin, first=number == 1), origin)
    if empty:
        raise FormatError(f"{path} has no rows; write one JSON object per line")


def read_examples(source: Any) -> Iterator[Example]:
    """The examples of a path, of several paths, or of a sequence of rows (`datasets.Dataset` too).

    Examples that are parsed already pass through.
    """
    if isinstance(source, str | os.PathLike):
        yield from read_jsonl(source)
    elif isinstance(source, Mapping):
        raise FormatError(
            f"data: one mapping ({', '.join(map(str, source))}) where rows are wanted"
        )
    elif isinstance(source, Iterable):
        for number, row in enumerate(source, 1):
            if isinstance(row, Example):
                yield row
            elif isinstance(row, str | os.PathLike):
                yield from read_jsonl(row)
            else:
                yield parse_row(row, f"row {number}")
    else:
        raise FormatError(f"data: a path or a sequence of rows is wanted, not {source!r}")


def _lines(stream: BinaryIO, path: Path, limit: int) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise FormatError(
                f"{path}:{number}: the line is longer than {limit:,} bytes; a row is one line, so "
                "this is hardly JSON lines"
            )
        if line.strip():
            yield number, line


def _load(line: bytes, origin: str, first: bool) -> Any:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{origin}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from None
    if first and text.lstrip().startswith("["):
        raise FormatError(f"{origin}: a JSON array; write one JSON object per line instead")
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise FormatError(f"{origin}: malformed JSON{column} ({reason})") from None
