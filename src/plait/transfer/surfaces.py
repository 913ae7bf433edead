"""What each token of a vocabulary spells, as bytes, whatever way its tokenizer writes it down.

    byte-level BPE  "Ġcafé" as "ĠcafÃ©"      SentencePiece  "▁café", "<0x0A>"      WordPiece  "##fé"

Tokens can then be compared across tokenizers. Special tokens spell their role, with a zero byte in
front that no text has.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from plait.errors import PlaitError

ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of every id, in order; empty for ids without a token.

    A token with a role ("eos") spells it; other special tokens spell their name. PlaitError for a
    tokenizer that is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise PlaitError(
            f"{type(tokenizer).__name__} does not tell how it spells tokens; load the fast one."
        )
    spell = _speller(tokenizer)
    names = dict(tokenizer.get_vocab())
    added = dict(tokenizer.added_tokens_decoder)
    found = [b""] * (max([*names.values(), *added], default=-1) + 1)
    for name, index in names.items():
        if index not in added or _BYTE.fullmatch(name):
            found[index] = spell(name)
        else:
            found[index] = (b"\x00" if added[index].special else b"") + name.encode()
    for role in reversed(ROLES):  # one token may have several roles: the first of them counts
        index = getattr(tokenizer, f"{role}_token_id", None)
        if index is not None:
            found[index] = b"\x00" + role.encode()
    return found


def _speller(tokenizer: Any) -> Any:
    """name -> bytes, by what the tokenizer's decoder undoes."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    kinds = {part.get("type") for part in [decoder, *decoder.get("decoders", [])]}
    if "ByteLevel" in kinds:
        return _byte_level
    if "WordPiece" in kinds:
        prefix = decoder.get("prefix", "##")
        return lambda name: _word_piece(name, prefix)
    return _metaspace


def _byte_level(name: str) -> bytes:
    table = _alphabet()
    if all(letter in table for letter in name):
        return bytes(table[letter] for letter in name)
    return name.encode()


def _word_piece(name: str, prefix: str) -> bytes:
    inside = name.startswith(prefix)
    return (name.removeprefix(prefix) if inside else " " + name).encode()


def _metaspace(name: str) -> bytes:
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace("▁", " ").encode()


@cache
def _alphabet() -> dict[str, int]:
    """{letter: byte} of byte-level BPE: printable bytes are themselves, others moved above 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in plain}
    rest = (byte for byte in range(256) if byte not in plain)
    return table | {chr(256 + i): byte for i, byte in enumerate(rest)}
