"""Errors that callers may want to catch, and the "did you mean" they carry."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PlaitError(ValueError):
    """Something the user gave does not fit; the message says what, where and what to do."""


class UnknownNameError(PlaitError, KeyError):
    """A name (adapter, method, target, recipe key) that does not exist."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class FormatError(PlaitError):
    """A file or folder that is damaged, unsafe, or of a form Plait does not read."""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None when nothing is close."""
    found = difflib.get_close_matches(name, list(candidates), n=5, cutoff=0.5)
    # Swapped letters are the likeliest slip, and difflib counts them as two.
    swapped = [c for c in found if sorted(c) == sorted(name)]
    return next(iter(swapped or found), None)


def unknown(kind: str, name: str, candidates: Iterable[str], where: str = "") -> UnknownNameError:
    """An error for an unknown `name` that names the nearest valid one (or lists a few)."""
    known = sorted(set(candidates))
    guess = nearest(name, known)
    if guess is not None:
        hint = f"did you mean {guess!r}?"
    elif known:
        shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        hint = f"known: {shown}."
    else:
        hint = "there is none yet."
    place = f" in {where}" if where else ""
    return UnknownNameError(f"unknown {kind} {name!r}{place}; {hint}")
