"""The mean of the adapter over the second half of training ends lower than its last step."""

from lab import Claim, Contender, compare, main

LORA = {"rank": 8, "alpha": 16}

CLAIM = Claim(
    slug="ema",
    paper="Izmailov et al., 2018, arXiv 1803.05407",
    statement="the mean of LoRA's factors over the second half of training has a lower loss than "
    "the factors of the last step",
    task="digits-vit",
    contenders=(
        Contender("mean", "lora", LORA, rules=({"ema": {"decay": 1.0, "start": 0.5}},)),
        Contender("last step", "lora", LORA),
    ),
    judge=lambda found: compare(found, "mean", "last step"),
    note="Both sides run under the same cosine to zero, which already calms the last steps; each "
    "has its own learning rate. The papers average under a constant or cyclical rate, over epochs.",
)

if __name__ == "__main__":
    main(CLAIM)
