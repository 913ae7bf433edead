"""AdaMerging beats the tuned sum."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="adamerging",
    paper="Yang et al., 2023, arXiv 2310.02575",
    statement="coefficients of least entropy on unlabelled rows are more accurate than the tuned "
    "sum",
    parts=(Part("adamerging", "linear"),),
    note="Task-wise coefficients, 16 evaluations on as many rows in all as the sum is tuned on; "
    "the paper takes 500 steps.",
)

if __name__ == "__main__":
    main(CLAIM)
