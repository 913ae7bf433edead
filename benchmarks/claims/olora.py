"""OLoRA converges faster than LoRA."""

from lab import Claim, Contender, compare, main
from lab.verdict import all_of

CLAIM = Claim(
    slug="olora",
    paper="Büyükakyüz, 2024, arXiv 2406.01775",
    statement="after few steps OLoRA has a lower training loss than LoRA, and a lower test loss",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", {"rank": 4, "alpha": 4}),
        Contender("olora", "lora", {"rank": 4, "alpha": 4}, initializer="olora"),
    ),
    judge=lambda found: all_of(
        compare(found, "olora", "lora", "train"), compare(found, "olora", "lora")
    ),
    steps=80,
)

if __name__ == "__main__":
    main(CLAIM)
