"""WUDI beats the tuned sum, TIES and TSV."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="wudi",
    paper="Cheng et al., 2025, arXiv 2503.08099",
    statement="a change that acts as each expert on its own row space is more accurate than the "
    "tuned sum, TIES and TSV",
    parts=(
        Part("wudi", "linear"),
        Part("wudi", "ties"),
        Part("wudi", "tsv"),
    ),
)

if __name__ == "__main__":
    main(CLAIM)
