"""RegMean beats the mean."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="regmean",
    paper="Jin et al., 2022, arXiv 2212.09849",
    statement="the least-squares fit to every expert's outputs is more accurate than the mean, and "
    "than the tuned sum",
    parts=(
        Part("regmean", "average"),
        Part("regmean", "linear"),
    ),
    note="Grams from 96 training rows of each task.",
)

if __name__ == "__main__":
    main(CLAIM)
