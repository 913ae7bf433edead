"""Localize-and-Stitch forgets least."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="localize-stitch",
    paper="He et al., 2024, arXiv 2408.13656",
    statement="merging each change's most important tenth keeps more of the base's general "
    "abilities than the tuned sum, and is within 0.02 of it on the tasks",
    parts=(
        Part("localize-stitch", "linear", "general"),
        Part("localize-stitch", "linear", margin=0.02),
    ),
    note="Masks by magnitude, without data; the share kept is tuned from a tenth.",
)

if __name__ == "__main__":
    main(CLAIM)
