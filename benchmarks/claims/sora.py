"""SoRA does better than LoRA with 70 % of its components left."""

from lab import Claim, Contender, compare, main

CLAIM = Claim(
    slug="sora",
    paper="Ding et al., 2023, arXiv 2311.11696",
    statement="of rank 8, cut to 5.6 on average by its gates, SoRA reaches a lower loss than LoRA "
    "of rank 8",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", {"rank": 8, "alpha": 16}),
        Contender(
            "sora",
            "sora",
            {"rank": 8, "alpha": 16},
            rules=({"sora": {"lambdas": [0.4], "target_rank": 5.6}},),
        ),
    ),
    judge=lambda found: compare(found, "sora", "lora"),
    note="What the gates leave beyond 5.6 at the end goes by its norm, so that the adapter scored "
    "has at most 70 % of LoRA's factors. Parameters are counted at the start of training.",
)

if __name__ == "__main__":
    main(CLAIM)
