"""LaMDA++ uses the same mean rank better than LaMDA."""

from lab import Claim, Contender, compare, main

CLAIM = Claim(
    slug="lamda-plus-plus",
    paper="Azizi et al., 2024, arXiv 2406.12832",
    statement="ranks dealt out by spectrum beat one rank for all at the same mean",
    task="digits-vit",
    contenders=(
        Contender("lamda", "lamda", {"rank": 8}, rules=("lamda",)),
        Contender("lamda++", "lamda-plus-plus", {"rank": 8}, rules=("lamda",)),
    ),
    judge=lambda found: compare(found, "lamda++", "lamda"),
    seeds=(0, 1, 2, 3, 4),
)

if __name__ == "__main__":
    main(CLAIM)
