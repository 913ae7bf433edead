"""TeRA reaches a high rank with fewer numbers than the other vector method."""

from lab import Claim, Contender, compare, figures, main
from lab.verdict import all_of, at_most

CLAIM = Claim(
    slug="tera",
    paper="Gu et al., 2025, arXiv 2509.03234",
    statement="with fewer parameters than VeRA, TeRA reaches VeRA's loss within 0.1 where the "
    "change must be of high rank",
    task="digits-shuffled",
    contenders=(
        Contender("tera", "tera", {"rank": 16}, rates=(3e-3, 1e-2, 3e-2, 1e-1)),
        Contender("vera", "vera", {"rank": 64}, rates=(3e-3, 1e-2, 3e-2, 1e-1)),
    ),
    judge=lambda found: all_of(
        compare(found, "tera", "vera", margin=0.1),
        at_most(
            figures(found, "tera", "parameters")[0] / figures(found, "vera", "parameters")[0],
            1.0,
            "TeRA's parameters over VeRA's",
        ),
    ),
    note="TeRA: 40 and 48 numbers a site and full rank; VeRA: 192, and rank 64.",
)

if __name__ == "__main__":
    main(CLAIM)
