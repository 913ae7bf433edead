"""Iso-C and Iso-CTS beat the tuned sum."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="iso-c",
    paper="Marczak et al., 2025, arXiv 2502.04959",
    statement="a sum with a flat spectrum is more accurate than the tuned sum, and so is one that "
    "keeps directions of each task besides",
    parts=(
        Part("iso-c", "linear"),
        Part("iso-cts", "linear"),
    ),
)

if __name__ == "__main__":
    main(CLAIM)
