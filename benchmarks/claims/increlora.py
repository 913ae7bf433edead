"""IncreLoRA beats LoRA at the number of parameters that it ends with."""

from lab import Claim, Contender, compare, main

CLAIM = Claim(
    slug="increlora",
    paper="Zhang et al., 2023, arXiv 2308.12043",
    statement="rank 1 grown to 2 on average, where it matters most, reaches a lower loss than LoRA "
    "of rank 2",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", {"rank": 2, "alpha": 4}),
        Contender(
            "increlora",
            "increlora",
            {"rank": 1, "reserve": 1, "alpha": 2},
            rules=({"increlora": {"target_rank": 2}},),
            rates=(3e-3, 1e-2, 3e-2, 1e-1),
        ),
    ),
    judge=lambda found: compare(found, "increlora", "lora"),
    note="Gates start at 0 between factors of size 0.02, so IncreLoRA's rates are three times "
    "LoRA's. Parameters are counted at the start of training.",
)

if __name__ == "__main__":
    main(CLAIM)
