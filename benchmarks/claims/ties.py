"""TIES beats the mean and the sum."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="ties",
    paper="Yadav et al., 2023, arXiv 2306.01708",
    statement="trimming and electing signs before merging eight experts is more accurate on their "
    "tasks than the mean, and than the tuned sum",
    parts=(
        Part("ties", "average"),
        Part("ties", "linear"),
    ),
)

if __name__ == "__main__":
    main(CLAIM)
