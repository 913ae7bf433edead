"""KaSA beats LoRA, and it takes both its singular values and the cut."""

from lab import Claim, Contender, compare, main
from lab.verdict import all_of

CLAIM = Claim(
    slug="kasa",
    paper="Wang et al., 2024, arXiv 2412.06071",
    statement="KaSA reaches a lower loss than LoRA of the same rank, and than itself without the "
    "cut",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", {"rank": 4, "alpha": 8}),
        Contender("kasa", "kasa", {"rank": 4, "alpha": 8}),
        Contender("uncut", "kasa", {"rank": 4, "alpha": 8, "truncate": False}),
    ),
    judge=lambda found: all_of(compare(found, "kasa", "lora"), compare(found, "kasa", "uncut")),
)

if __name__ == "__main__":
    main(CLAIM)
