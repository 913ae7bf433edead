"""EMR comes close to the experts without tuning."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="emr",
    paper="Huang et al., 2024, arXiv 2405.17461",
    statement="one change with a mask and a scale for each task is within 0.03 of the experts, and "
    "above the tuned sum",
    parts=(
        Part("emr, task known", "own experts", margin=0.03),
        Part("emr, task known", "linear"),
    ),
    note="It is told the task, which the sum is not.",
)

if __name__ == "__main__":
    main(CLAIM)
