"""A page shows text as it is, holds its pictures, and asks nothing of anybody."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

from plait.evaluation.page import (
    Cell,
    Code,
    Folded,
    Picture,
    Section,
    Side,
    Table,
    Text,
    page,
    write_page,
)

NASTY = "<script>alert(1)</script>\" onload='x' & <b>"


def tiny_png() -> bytes:
    """One white pixel, chunk by chunk."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0\xff")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in parts)


class Reader(HTMLParser):
    """The tags, attributes and text that a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def everything() -> str:
    parts = [
        Text(NASTY, "bad"),
        Code(NASTY),
        Table([NASTY, "n"], [[NASTY, 1.23456], [Cell(NASTY, "good"), None]], caption=NASTY),
        Picture(tiny_png(), NASTY, NASTY, width=300),
    ]
    return page(NASTY, [Section(NASTY, [Folded(NASTY, parts), Side(parts)]), *parts], lead=NASTY)


def test_text_is_shown_and_never_obeyed() -> None:
    found = Reader(everything())
    assert not {"script", "b"} & {tag for tag, _ in found.tags}
    assert not any("onload" in attributes for _, attributes in found.tags)
    # Title, heading, lead, section and fold; then seven in each of the three blocks of parts.
    assert "".join(found.text).count(NASTY) == 5 + 3 * 7
    assert {a["alt"] for tag, a in found.tags if tag == "img"} == {NASTY}


def test_pictures_travel_inside_and_nothing_is_fetched() -> None:
    text = everything()
    found = Reader(text)
    sources = [a["src"] or "" for tag, a in found.tags if tag == "img"]
    assert {base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in sources} == {
        tiny_png()
    }
    assert not re.search(r"https?://|url\(|@import", text)
    policy = next(a["content"] for tag, a in found.tags if "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'")


def test_numbers_are_rounded_and_stand_on_the_right() -> None:
    found = Reader(Table(["name", "loss"], [["a", 1.23456], ["b", None]]).html())
    assert "".join(found.text) == "namelossa1.235b–"
    assert [a.get("class") for tag, a in found.tags if tag in ("th", "td")] == [None, "n"] * 3


def test_a_page_replaces_another_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.html"
    write_page(target, "one", [Text("first")])
    assert write_page(target, "two", [Text("zweite ü")]) == target
    assert "zweite ü" in target.read_text(encoding="utf-8")
    assert [p.name for p in target.parent.iterdir()] == ["page.html"]
