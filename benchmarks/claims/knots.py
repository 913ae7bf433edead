"""KnOTS raises TIES for adapters."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="knots",
    paper="Stoica et al., 2024, arXiv 2410.19735",
    statement="TIES on coordinates in a joint basis is more accurate than TIES on the entries of "
    "dW",
    parts=(Part("knots", "ties, entries of dW"),),
)

if __name__ == "__main__":
    main(CLAIM)
