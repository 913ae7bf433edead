"""Expert Merging beats merges without training."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="expert-merging",
    paper="Zhang et al., 2025, arXiv 2509.25712",
    statement="coefficients that match the experts' outputs on unlabelled rows are more accurate "
    "than the tuned sum, TIES and AdaMerging",
    parts=(
        Part("expert-merging", "linear"),
        Part("expert-merging", "ties"),
        Part("expert-merging", "adamerging"),
    ),
    note="16 evaluations on as many rows in all as the others are tuned on.",
)

if __name__ == "__main__":
    main(CLAIM)
