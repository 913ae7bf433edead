"""DARE: nine tenths of a change can go."""

from lab import main
from lab.merges import Part, merge_claim

CLAIM = merge_claim(
    slug="dare",
    paper="Yu et al., 2024, arXiv 2311.03099",
    statement="with nine tenths of the entries of an expert's change dropped and the rest "
    "rescaled, its accuracy falls by at most 0.02 of itself",
    parts=(Part("dare alone, a tenth kept", "own experts", margin=0.02),),
    note="Each expert by itself, entries of dW, one draw, nothing tuned, not cut to a lower rank.",
)

if __name__ == "__main__":
    main(CLAIM)
