"""TALL masks give tasks back; consensus helps the sum."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="consensus-ta",
    paper="Wang et al., 2024, arXiv 2405.07813",
    statement="a mask on the sum gives each task's expert back to 0.99 of its accuracy, and "
    "leaving out what fewer than two experts use is more accurate than the tuned sum",
    parts=(
        Part("consensus-ta, task known", "own experts", margin=0.01),
        Part("consensus-ta", "linear"),
    ),
)

if __name__ == "__main__":
    main(CLAIM)
