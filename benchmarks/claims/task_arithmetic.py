"""Task arithmetic: changes add up to a model of many tasks."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="task-arithmetic",
    paper="Ilharco et al., 2022, arXiv 2212.04089",
    statement="the sum of eight changes at a tuned factor is more accurate on their tasks than the "
    "base, and than their mean",
    parts=(
        Part("linear", "base"),
        Part("linear", "average"),
    ),
)

if __name__ == "__main__":
    main(CLAIM)
