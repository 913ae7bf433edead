"""OptMerge beats earlier merges without data."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="optmerge",
    paper="Wei et al., 2025, arXiv 2505.19892",
    statement="WUDI on each expert's leading directions is more accurate than WUDI, the tuned sum "
    "and TIES",
    parts=(
        Part("optmerge", "wudi"),
        Part("optmerge", "linear"),
        Part("optmerge", "ties"),
    ),
)

if __name__ == "__main__":
    main(CLAIM)
