"""Breadcrumbs beats the tuned sum."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="breadcrumbs",
    paper="Davari and Belilovsky, 2023, arXiv 2312.06795",
    statement="leaving out each change's largest and smallest entries is more accurate than the "
    "tuned sum",
    parts=(Part("breadcrumbs", "linear"),),
)

if __name__ == "__main__":
    main(CLAIM)
