"""Noto emoji: pictures of 64 x 64 pixels with English names and categories.

Rows ask for the category (nine; "Component" is left out), or with `ask="subcategory"` for the finer
group; `image` is the path of the PNG. Only the 64-pixel pictures without skin tones are kept.
Licence: pictures Apache-2.0 and OFL (Google Noto), package MIT.
Package: npm emoji-datasource-google 16.0.0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.tasks.archive import Archive, Say, unpacked
from benchmarks.tasks.rows import Row, choice

NAME = "emoji"
ARCHIVE = Archive(
    "npm",
    "emoji-datasource-google@16.0.0",
    74_344_091,
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)
_SKIN = tuple(f"1f3f{digit}" for digit in "bcdef")


def fetch(say: Say | None = None) -> Path:
    """The folder with emoji.json and `64/*.png`."""
    return unpacked(NAME, ARCHIVE, keep, say)


def keep(member: str) -> str | None:
    """Where a member goes."""
    if member == "package/emoji.json":
        return "emoji.json"
    before = "package/img/google/"
    if not (member.startswith(before + "64/") and member.endswith(".png")):
        return None
    picture = member[len(before) :]
    return None if any(tone in picture for tone in _SKIN) else picture


def emoji() -> list[dict[str, Any]]:
    """{"name", "category", "subcategory", "image", ...} of each, in the file's order."""
    return json.loads((fetch() / "emoji.json").read_text(encoding="utf-8"))


def rows(
    ask: Literal["category", "subcategory"] = "category", within: Sequence[str] = ()
) -> list[Row]:
    """Emoji of these categories (all by default) by name, asking for the category or subcategory.

    The name is the prompt in lower case without what stands before a colon ("flag: ..."), which
    would give the category away.
    """
    known = [e for e in emoji() if e["category"] != "Component"]
    known = [e for e in known if not within or e["category"] in within]
    options = list(dict.fromkeys(e[ask] for e in known))
    folder = fetch() / "64"
    return [
        choice(_plain(e["name"]), options, e[ask], image=str(folder / e["image"])) for e in known
    ]


def _plain(name: str) -> str:
    return name.rsplit(":", 1)[-1].strip().lower()
