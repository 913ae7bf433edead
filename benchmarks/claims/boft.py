"""BOFT's butterfly does more with its numbers than OFT's blocks."""

from lab import Claim, Contender, compare, figures, main
from lab.verdict import all_of, at_most

CLAIM = Claim(
    slug="boft",
    paper="Liu et al., 2023, arXiv 2311.06243",
    statement="at no more than 1.15 times the parameters, two butterfly factors of blocks of 4 "
    "beat OFT in blocks of 8",
    task="digits-vit",
    contenders=(
        Contender("oft", "oft", {"block_size": 8, "terms": None}),
        Contender("boft", "boft", {"block_size": 4, "factors": 2}),
    ),
    judge=lambda found: all_of(
        at_most(
            figures(found, "boft", "parameters")[0] / figures(found, "oft", "parameters")[0],
            1.15,
            "BOFT's parameters over OFT's",
        ),
        compare(found, "boft", "oft"),
    ),
    note="BOFT's scale of the outputs is counted, which OFT has not.",
)

if __name__ == "__main__":
    main(CLAIM)
