"""AdaLoRA beats LoRA at an equal number of parameters at the end."""

from lab import Claim, Contender, compare, main

CLAIM = Claim(
    slug="adalora",
    paper="Zhang et al., 2023, arXiv 2303.10512",
    statement="rank 3 pruned to 2 on average, where it matters least, reaches a lower loss than "
    "LoRA of rank 2",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", {"rank": 2, "alpha": 4}),
        Contender(
            "adalora",
            "adalora",
            {"rank": 3, "alpha": 6},
            rules=({"adalora": {"target_rank": 2}},),
            rates=(3e-3, 1e-2, 3e-2, 1e-1),
        ),
    ),
    judge=lambda found: compare(found, "adalora", "lora"),
    note="AdaLoRA's singular values start at 0 between factors of size 0.02, so its rates are "
    "three times LoRA's. Parameters are counted at the start of training.",
)

if __name__ == "__main__":
    main(CLAIM)
