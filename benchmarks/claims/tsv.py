"""TSV-Merge beats the tuned sum."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="tsv",
    paper="Gargiulo et al., 2024, arXiv 2412.00081",
    statement="singular vectors made orthonormal together before they are summed are more accurate "
    "than the tuned sum",
    parts=(Part("tsv", "linear"),),
)

if __name__ == "__main__":
    main(CLAIM)
