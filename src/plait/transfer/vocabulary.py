"""Carrying tokens of one vocabulary to another: rows of a sparse matrix, each of them a share.

    exact     to the token that spells the same bytes
    edit      else to the one of least edit distance (of several, the lowest id)
    counts    else, before edit, to those that stood where it stood in texts that both read, in
              proportion to how often

Rows add up to 1 or, where a token goes nowhere, to 0: what is carried loses that mass.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from plait.errors import PlaitError, unknown
from plait.transfer.alignment import align_tokens, is_special, one_to_one
from plait.transfer.surfaces import token_bytes

How = Literal["exact", "edit", "counts"]
Pairs = Mapping[tuple[int, int], int]
"""{(source id, target id): how often they stood for the same part of a text}."""
Row = tuple[tuple[int, ...], tuple[float, ...]]
"""Target ids and the share that goes to each."""


class VocabularyMap:
    """Where each source token goes; rows are found when they are asked for, and kept.

    Raises PlaitError for an unknown way, and for "counts" without pairs.
    """

    def __init__(
        self,
        source: Sequence[bytes],
        target: Sequence[bytes],
        how: How = "edit",
        *,
        pairs: Pairs | None = None,
        farthest: int | None = None,
    ) -> None:
        if how not in get_args(How):
            raise unknown("way to map a vocabulary", how, get_args(How))
        if how == "counts" and not pairs:
            raise PlaitError("mapping a vocabulary by counts needs pairs=count_pairs(...).")
        self.source, self.target, self.how, self.farthest = source, target, how, farthest
        self._same = _first_ids(target)
        self._counted = _by_source(pairs or {}) if how == "counts" else {}
        self._nearest: _Nearest | None = None
        self._rows: dict[int, Row] = {}

    def row(self, index: int) -> Row:
        """Where one source id goes."""
        if index not in self._rows:
            self._rows[index] = self._found(index)
        return self._rows[index]

    def pin(self, index: int, target: int) -> None:
        """Send one source id to one target id, if it goes nowhere else (as two chat templates' ends
        of a turn do, which have other names)."""
        if not self.row(index)[0]:
            self._rows[index] = (target,), (1.0,)

    def _found(self, index: int) -> Row:
        text = self.source[index] if index < len(self.source) else b""
        if not text:
            return (), ()
        if text in self._same:
            return (self._same[text],), (1.0,)
        if index in self._counted:
            counts = self._counted[index]
            total = sum(counts.values())
            return tuple(counts), tuple(n / total for n in counts.values())
        if self.how == "exact" or is_special(text):
            return (), ()
        self._nearest = self._nearest or _Nearest(self.target)
        near = self._nearest(text, self.farthest)
        return ((), ()) if near is None else ((near,), (1.0,))


def map_vocabulary(
    source: Any,
    target: Any,
    how: How = "edit",
    *,
    texts: Iterable[str] = (),
    farthest: int | None = None,
) -> VocabularyMap:
    """A map from one tokenizer's ids to another's.

    Args:
        how: "exact", "edit" or "counts" (see the module); special tokens only go to the same role.
        texts: what "counts" reads with both tokenizers.
        farthest: the greatest edit distance that still counts, in bytes; None takes any.
    """
    pairs = count_pairs(source, target, texts) if how == "counts" else None
    return VocabularyMap(
        token_bytes(source), token_bytes(target), how, pairs=pairs, farthest=farthest
    )


def count_pairs(source: Any, target: Any, texts: Iterable[str]) -> Counter[tuple[int, int]]:
    """How often a source token and a target token alone stood for the same part of these texts."""
    spelt, spells = token_bytes(source), token_bytes(target)
    found: Counter[tuple[int, int]] = Counter()
    for text in texts:
        here, there = (t(text, add_special_tokens=False)["input_ids"] for t in (source, target))
        alignment = align_tokens([spelt[i] for i in here], [spells[i] for i in there])
        for j, i in enumerate(one_to_one(alignment)):
            if i is not None:
                found[here[i], there[j]] += 1
    return found


def _by_source(pairs: Pairs) -> dict[int, dict[int, int]]:
    found: dict[int, dict[int, int]] = defaultdict(dict)
    for (one, other), count in sorted(pairs.items()):
        found[one][other] = found[one].get(other, 0) + count
    return dict(found)


def _first_ids(target: Sequence[bytes]) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for index, text in enumerate(target):
        if text:
            found.setdefault(text, index)
    return found


class _Nearest:
    """The token of least edit distance: tokens of one length are compared all at once."""

    def __init__(self, target: Sequence[bytes]) -> None:
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, text in enumerate(target):
            if text and not is_special(text):
                by_length[len(text)].append(index)
        self.ids = {n: np.array(ids) for n, ids in by_length.items()}
        self.letters = {
            n: np.frombuffer(b"".join(target[i] for i in ids), np.uint8).reshape(-1, n)
            for n, ids in by_length.items()
        }

    def __call__(self, text: bytes, farthest: int | None) -> int | None:
        best, chosen = farthest if farthest is not None else 1 << 30, None
        for length in sorted(self.ids, key=lambda n: (abs(n - len(text)), n)):
            if abs(length - len(text)) > best:
                break  # as many insertions or deletions at least
            distances = _distances(text, self.letters[length])
            least = int(distances.min())
            number = int(self.ids[length][int(distances.argmin())])
            if least < best or (least == best and (chosen is None or number < chosen)):
                best, chosen = least, number
        return chosen


def _distances(text: bytes, others: np.ndarray) -> np.ndarray:
    """Edit distances of `text` from each row of others [n, length]."""
    count, length = others.shape
    row = np.broadcast_to(np.arange(length + 1, dtype=np.int32)[:, None], (length + 1, count))
    for i, letter in enumerate(text, 1):
        new = np.empty_like(row)
        new[0] = i
        differs = (others != letter).T
        for j in range(1, length + 1):
            new[j] = np.minimum(np.minimum(row[j], new[j - 1]) + 1, row[j - 1] + differs[j - 1])
        row = new
    return row[-1]
