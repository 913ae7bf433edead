"""ALLoRA learns faster than LoRA in a short run, with neither dropout nor alpha / r."""

from lab import Claim, Contender, compare, main
from lab.verdict import all_of

CLAIM = Claim(
    slug="allora",
    paper="Huang and Balestriero, 2024, arXiv 2410.09692",
    statement="in 60 steps ALLoRA reaches a lower loss than LoRA, with dropout or without",
    task="digits-vit",
    steps=60,
    contenders=(
        Contender("lora", "lora", {"rank": 8, "alpha": 16}),
        Contender("lora with dropout", "lora", {"rank": 8, "alpha": 16, "dropout": 0.05}),
        Contender("allora", "lora", {"rank": 8, "alpha": 8}, rules=("allora",)),
    ),
    judge=lambda found: all_of(
        compare(found, "allora", "lora"),
        compare(found, "allora", "lora with dropout"),
    ),
    note="eta is 2, the factor is that of rows of dW and scales AdamW's movement; the paper trains "
    "Llama and Qwen models on commonsense and perception sets.",
)

if __name__ == "__main__":
    main(CLAIM)
