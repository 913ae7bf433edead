"""Which tokens of two tokenisations of one text stand for the same part of it.

    teacher   Mer | ging | ▁adapters              target 0: (0, 1)    both spell a part of it
    target    Merging  | ▁adap | ters              target 1: (2,)      target 2: (2,)

Where both spell the same bytes, tokens are aligned whose bytes overlap. Where they do not (one
lowers letters, or drops accents), the path through the grid of pairs is taken that has the least
sum of edit distances, by dynamic programming (time warping), as FuseLLM does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

Alignment = list[tuple[int, ...]]
"""For every target token, the source tokens that it is aligned with, in order."""


def align_tokens(source: Sequence[bytes], target: Sequence[bytes]) -> Alignment:
    """The source tokens that every target token stands beside; both as bytes (see `token_bytes`).

    Where both have as many special tokens, each is aligned with its counterpart, and the texts
    between them for themselves. A text may be the other's beginning. A space before it, which some
    tokenizers add, counts as none. Tokens that spell nothing are aligned with nothing.
    """
    ours, theirs = _specials(source), _specials(target)
    if len(ours) != len(theirs):
        return _aligned(source, target, 0)
    found: Alignment = []
    starts = zip([-1, *ours], [-1, *theirs], strict=True)
    ends = zip([*ours, len(source)], [*theirs, len(target)], strict=True)
    for (i, j), (end, other) in zip(starts, ends, strict=True):
        found += [(i,)] * (j >= 0)
        found += _aligned(source[i + 1 : end], target[j + 1 : other], i + 1)
    return found


def is_special(token: bytes) -> bool:
    return token.startswith(b"\x00")


def _specials(tokens: Sequence[bytes]) -> list[int]:
    return [i for i, token in enumerate(tokens) if is_special(token)]


def _aligned(source: Sequence[bytes], target: Sequence[bytes], first: int) -> Alignment:
    """Of one text; source tokens are numbered from `first` on."""
    source, target = _without_lead(source), _without_lead(target)
    one, other = b"".join(source), b"".join(target)
    same = one.startswith(other) or other.startswith(one)
    found = _overlapping(source, target) if same else _warped(source, target)
    return [tuple(first + i for i in others) for others in found]


def one_to_one(alignment: Alignment) -> list[int | None]:
    """For every target token the one source token that it alone is aligned with, else None."""
    count: dict[int, int] = {}
    for others in alignment:
        for other in others:
            count[other] = count.get(other, 0) + 1
    return [
        others[0] if len(others) == 1 and count[others[0]] == 1 else None for others in alignment
    ]


def _without_lead(tokens: Sequence[bytes]) -> list[bytes]:
    found = list(tokens)
    if found and found[0].startswith(b" "):
        found[0] = found[0][1:]
    return found


def _overlapping(source: Sequence[bytes], target: Sequence[bytes]) -> Alignment:
    found: Alignment = []
    first, start, begin = 0, 0, 0  # of the source token in question: its number and first byte
    for token in target:
        end, here, at, number = begin + len(token), [], start, first
        while number < len(source) and at < end:
            after = at + len(source[number])
            if after > max(begin, at):
                here.append(number)
            if after <= end:
                first, start = number + 1, after
            at, number = after, number + 1
        found.append(tuple(here) if token else ())
        begin = end
    return found


def _warped(source: Sequence[bytes], target: Sequence[bytes]) -> Alignment:
    if not source or not target:
        return [() for _ in target]
    far = float("inf")
    rows, columns = len(source), len(target)
    cost = [[far] * (columns + 1) for _ in range(rows + 1)]
    cost[0][0] = 0.0
    for i in range(rows):
        for j in range(columns):
            before = min(cost[i][j], cost[i][j + 1], cost[i + 1][j])
            cost[i + 1][j + 1] = before + edit_distance(source[i], target[j])
    found: list[list[int]] = [[] for _ in target]
    i, j = rows, columns
    while i and j:
        found[j - 1].append(i - 1)
        # Of equal ways the diagonal, so that equal tokens pair off one by one.
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda at: cost[at[0]][at[1]])
    return [tuple(reversed(others)) for others in found]


@lru_cache(maxsize=1 << 16)
def edit_distance(one: bytes, two: bytes) -> int:
    """Insertions, deletions and exchanges of bytes that turn one into two (Levenshtein)."""
    if one == two:
        return 0
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, 1):
        corner, row[0] = row[0], i
        for j, b in enumerate(two, 1):
            step = min(row[j] + 1, row[j - 1] + 1, corner + (a != b))
            corner, row[j] = row[j], step
    return row[-1]
