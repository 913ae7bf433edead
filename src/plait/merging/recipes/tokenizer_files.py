"""A tokenizer's files: read for its tokens, grown by others' tokens, written again."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import FormatError, PlaitError

NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
)
"""The files that a tokenizer may consist of."""
STALE = ("vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "tokenizer.model")
"""What tokenizer.json says too, and what no longer holds when it has grown."""
TABLES = ("BPE", "WordPiece", "WordLevel")
"""Models whose vocabulary is a table that takes tokens of any number."""


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer: its folder, the content of tokenizer.json, {token: id}; and whether it grew."""

    folder: Path
    content: Mapping[str, Any]
    ids: Mapping[str, int]
    grown: bool = False

    def with_tokens_of(self, other: TokenizerFiles) -> TokenizerFiles:
        """This tokenizer with the tokens of another that it lacks, numbered on from its last.

        Added tokens stay added ones. Ordinary ones go into the table, with the merges that make
        them where there are merges; a table that cannot grow takes them as added tokens.
        """
        new = sorted((t for t in other.ids if t not in self.ids), key=lambda t: other.ids[t])
        if not new:
            return self
        content = copy.deepcopy(dict(self.content))
        ids = {**self.ids, **_numbered(new, self.ids)}
        flags = {t["content"]: t for t in other.content.get("added_tokens", ())}
        table = content["model"]["vocab"] if content["model"].get("type") in TABLES else None
        for token in new:
            if token in flags or table is None:
                like = flags.get(token, _plain(token))
                content["added_tokens"].append({**like, "id": ids[token]})
            else:
                table[token] = ids[token]
        _take_merges(content["model"], other.content["model"], set(new))
        return self._grown(content, ids)

    def with_special_tokens(self, tokens: Iterable[str]) -> TokenizerFiles:
        """With these tokens, as special ones where they are new."""
        new = [token for token in tokens if token not in self.ids]
        if not new:
            return self
        content = copy.deepcopy(dict(self.content))
        ids = {**self.ids, **_numbered(new, self.ids)}
        for token in new:
            content["added_tokens"].append(_plain(token) | {"id": ids[token], "special": True})
        return self._grown(content, ids)

    def _grown(self, content: dict[str, Any], ids: dict[str, int]) -> TokenizerFiles:
        """With all tokens in the table, where it is one: the library numbers added tokens that are
        not in it on from its end, which has moved."""
        if content["model"].get("type") in TABLES:
            for token in content["added_tokens"]:
                content["model"]["vocab"].setdefault(token["content"], ids[token["content"]])
        return dataclasses.replace(self, content=content, ids=ids, grown=True)

    def written(self) -> dict[str, bytes | Path]:
        """The files that make this tokenizer, by name."""
        found: dict[str, bytes | Path] = {}
        for name in NAMES:
            if (self.folder / name).is_file() and not (self.grown and name in STALE):
                found[name] = self.folder / name
        if self.grown:
            text = json.dumps(self.content, ensure_ascii=False, indent=1)
            self._check(text)
            found["tokenizer.json"] = text.encode()
        return found

    def _check(self, text: str) -> None:
        """That the library reads the file as it is meant."""
        from tokenizers import Tokenizer

        made = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
        if made != dict(self.ids):
            wrong = next(t for t in self.ids if made.get(t) != self.ids[t])
            raise PlaitError(
                f"{self.folder}: the tokenizer cannot take token {wrong!r} from another; use "
                "tokenizer_source: base, or a model's path."
            )


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """The tokenizer of a model's folder; PlaitError where there is none that can be read."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise PlaitError(
            f"{folder} has no tokenizer.json; write one with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    try:
        text = file.read_text(encoding="utf-8")
        ids = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
        content = json.loads(text)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FormatError(f"{file}: damaged, or not a tokenizer ({reason}).") from None
    return TokenizerFiles(folder, content, ids)


def _numbered(new: Iterable[str], ids: Mapping[str, int]) -> dict[str, int]:
    first = max(ids.values(), default=-1) + 1
    return {token: first + i for i, token in enumerate(new)}


def _plain(token: str) -> dict[str, Any]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": 0, "content": token, **dict.fromkeys(flags, False)}


def _take_merges(model: dict[str, Any], other: Mapping[str, Any], new: set[str]) -> None:
    """The other's merges that make a new token out of two known ones, after all of one's own."""
    known = model.get("vocab")
    if "merges" not in model or not isinstance(known, dict):
        return
    paired = not model["merges"] or isinstance(model["merges"][0], list)
    for merge in other.get("merges") or ():
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        if left + right in new and left in known and right in known:
            model["merges"].append([left, right] if paired else f"{left} {right}")
