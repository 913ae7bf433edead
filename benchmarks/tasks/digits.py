"""Scikit-learn's 1,797 handwritten digits, 8 x 8 pixels of 17 levels.

The prompt draws the picture in characters, so that text models can be asked; `image` [8][8] holds
the levels 0 to 16. Nothing is fetched. Licence: BSD-3-Clause (scikit-learn); data from the UCI
repository's Optical Recognition of Handwritten Digits, CC BY 4.0.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.tasks.archive import Say
from benchmarks.tasks.rows import Row, choice

NAME = "digits"
CHOICES = tuple("0123456789")
LEVELS = " .:-=+*#%@"


def fetch(say: Say | None = None) -> Path | None:
    """Nothing to fetch; an error says how to get scikit-learn."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise RuntimeError("digits come with scikit-learn: pip install scikit-learn") from error
    if say is not None:
        say("ready: part of scikit-learn")
    return None


def rows() -> list[Row]:
    """All pictures, asking for the digit."""
    fetch()
    from sklearn.datasets import load_digits

    found = load_digits()
    return [
        choice(drawn(image), CHOICES, str(label), image=[[int(v) for v in line] for line in image])
        for image, label in zip(found.images.tolist(), found.target.tolist(), strict=True)
    ]


def drawn(image: list[list[float]]) -> str:
    """A picture of levels 0 to 16 in characters, a line for each row."""
    most = len(LEVELS) - 1
    return "\n".join("".join(LEVELS[round(v / 16 * most)] for v in line) for line in image)
