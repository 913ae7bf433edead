"""One HTML file to read offline: sections of text, tables and pictures, all text escaped.

    page("Report", [Section("Scores", [Table(["name", "loss"], [["a", 0.5]]), Picture(png)])])

Pictures travel inside the file as PNG, nothing is fetched from anywhere, and the page's policy lets
no script run, whatever a name in somebody else's file holds.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plait.adapter.formats.atomic import text_writer, write_file

STYLE = """
:root { --ink: #1d2433; --soft: #5b6577; --line: #dfe3ea; --panel: #f6f7f9; --good: #0a7f5a;
  --bad: #b3261e; --warn: #8a5a00; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: #fff; margin: 0 auto;
  max-width: 68rem; padding: 2rem 1.25rem 5rem; }
h1 { font-size: 1.8rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); }
p { margin: .5rem 0; overflow-wrap: anywhere; }
.lead, .note, figcaption, caption { color: var(--soft); }
.note, figcaption, caption { font-size: .9rem; text-align: left; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.warn { color: var(--warn); font-weight: 600; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--soft); } .n { text-align: right; white-space: nowrap; }
.wrap td { overflow-wrap: anywhere; min-width: 9em; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; display: block; }
.side { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: flex-start; }
pre { font: .85rem/1.5 ui-monospace, monospace; background: var(--panel); padding: .7rem 1rem;
  border-radius: 6px; overflow-x: auto; }
summary { cursor: pointer; color: var(--soft); }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

Tone = Literal["", "good", "bad", "warn", "lead", "note"]


@dataclass(frozen=True)
class Text:
    """A paragraph. `tone` colours it, or makes it a lead or a note."""

    text: str
    tone: Tone = ""

    def html(self) -> str:
        return f"<p{_class(self.tone)}>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Code:
    """Lines to copy, or output as it was."""

    text: str

    def html(self) -> str:
        return f"<pre>{escape(self.text)}</pre>"


@dataclass(frozen=True)
class Cell:
    """A table's cell with a tone of its own; `number` sets text to the right as numbers are."""

    value: Any
    tone: Tone = ""
    number: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells: text, numbers (set to the right), None (a dash) or `Cell`s. `wrap` breaks
    long words too, for cells that hold whatever a model wrote."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    wrap: bool = False

    def html(self) -> str:
        right = [any(_is_number(r[i]) for r in self.rows) for i in range(len(self.columns))]
        head = "".join(_cell("th", name, n) for name, n in zip(self.columns, right, strict=True))
        body = "".join(
            f"<tr>{''.join(_cell('td', v, n) for v, n in zip(row, right, strict=True))}</tr>"
            for row in self.rows
        )
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        start = f"<table{_class('wrap' if self.wrap else '')}>"
        return f"<div class=wide>{start}{caption}<tr>{head}</tr>{body}</table></div>"


@dataclass(frozen=True)
class Picture:
    """A PNG, `width` CSS pixels wide (None: as large as it is, but never wider than the page)."""

    png: bytes
    alt: str = ""
    caption: str = ""
    width: int | None = None

    def html(self) -> str:
        data = base64.b64encode(self.png).decode()
        width = "" if self.width is None else f" width={int(self.width)}"
        caption = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        image = f'<img alt="{escape(self.alt)}"{width} src="data:image/png;base64,{data}">'
        return f"<figure>{image}{caption}</figure>"


@dataclass(frozen=True)
class Side:
    """Parts beside each other, as far as the window is wide."""

    parts: Sequence[Part]

    def html(self) -> str:
        return f"<div class=side>{_all(self.parts)}</div>"


@dataclass(frozen=True)
class Folded:
    """Parts behind a line to click on."""

    title: str
    parts: Sequence[Part]

    def html(self) -> str:
        return f"<details><summary>{escape(self.title)}</summary>{_all(self.parts)}</details>"


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: Sequence[Part]

    def html(self) -> str:
        return f"<section><h2>{escape(self.title)}</h2>{_all(self.parts)}</section>"


Part = Text | Code | Table | Picture | Side | Folded | Section


def page(title: str, parts: Sequence[Part], lead: str = "") -> str:
    """The whole file, with `title` as its heading and `lead` below that."""
    under = Text(lead, "lead").html() if lead else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{under}{_all(parts)}</body></html>\n"
    )


def write_page(
    path: str | os.PathLike[str], title: str, parts: Sequence[Part], lead: str = ""
) -> Path:
    """Write the page; missing folders are made, and a page that was there stays whole until the
    new one is."""
    return write_file(Path(path), text_writer(page(title, parts, lead)))


def png(figure: Any, dpi: int = 150) -> bytes:
    """A matplotlib figure as PNG bytes, trimmed to what is drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
    return buffer.getvalue()


def escape(value: Any) -> str:
    """Text that HTML shows as it is, in attributes too."""
    return html.escape(str(value), quote=True)


def _all(parts: Iterable[Part]) -> str:
    return "".join(part.html() for part in parts)


def _class(*names: str) -> str:
    kept = " ".join(name for name in names if name)
    return f' class="{kept}"' if kept else ""


def _cell(tag: str, value: Any, right: bool) -> str:
    tone = value.tone if isinstance(value, Cell) else ""
    value = _value(value)
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"<{tag}{_class(tone, 'n' if right else '')}>{escape(text)}</{tag}>"


def _value(cell: Any) -> Any:
    return cell.value if isinstance(cell, Cell) else cell


def _is_number(cell: Any) -> bool:
    if isinstance(cell, Cell):
        return cell.number or _is_number(cell.value)
    return isinstance(cell, int | float) and not isinstance(cell, bool)
