"""Hydra beats either of its branches at the same total rank."""

from lab import Claim, Contender, compare, main
from lab.verdict import all_of

CLAIM = Claim(
    slug="hydra",
    paper="Kim et al., 2023, arXiv 2309.06922",
    statement="the parallel and sequential branches together beat either alone at equal total rank",
    task="digits-vit",
    contenders=(
        Contender("hydra", "hydra", {"rank": 2, "bias": False}),
        Contender("parallel", "hydra", {"rank": 4, "branches": "parallel", "bias": False}),
        Contender("sequential", "hydra", {"rank": 4, "branches": "sequential", "bias": False}),
    ),
    judge=lambda found: all_of(
        compare(found, "hydra", "parallel"), compare(found, "hydra", "sequential")
    ),
)

if __name__ == "__main__":
    main(CLAIM)
