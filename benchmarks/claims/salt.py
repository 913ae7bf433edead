"""SALT beats LoRA and tuning of singular values alone."""

from lab import Claim, Contender, compare, main
from lab.verdict import all_of

CLAIM = Claim(
    slug="salt",
    paper="Elsayed et al., 2025, arXiv 2503.16055",
    statement="scaled and shifted leading singular values with a low-rank rest beat LoRA, and "
    "singular values alone, at about equal parameters",
    task="digits-few",
    contenders=(
        Contender("lora", "lora", {"rank": 2, "alpha": 2}),
        Contender("salt", "salt", {"rank": 1, "top": 32}),
        Contender("values", "salt", {"rank": 0, "top": 64}),
    ),
    judge=lambda found: all_of(
        compare(found, "salt", "lora", "accuracy"),
        compare(found, "salt", "values", "accuracy"),
    ),
)

if __name__ == "__main__":
    main(CLAIM)
