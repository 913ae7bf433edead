"""The mean of the last checkpoints ends lower than the last of them."""

from lab import Claim, Contender, compare, main

LORA = {"rank": 8, "alpha": 16}

CLAIM = Claim(
    slug="lawa",
    paper="Kaddour, 2022, arXiv 2209.14981",
    statement="the mean of the last six checkpoints, 5 steps apart, has a lower loss than the "
    "last of them",
    task="digits-vit",
    contenders=(
        Contender("lawa", "lora", LORA, rules=({"lawa": {"last": 6, "every": 5}},)),
        Contender("last checkpoint", "lora", LORA),
    ),
    judge=lambda found: compare(found, "lawa", "last checkpoint"),
    note="The paper's gain is time saved midway through a long training, at a rate that is still "
    "high; here both sides come to the end of the same cosine.",
)

if __name__ == "__main__":
    main(CLAIM)
