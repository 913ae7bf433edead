"""LoRA-SB beats LoRA-XS at equal parameters, and LoRA with many more."""

from lab import Claim, Contender, compare, main
from lab.verdict import all_of

CORES = (3e-3, 1e-2, 3e-2, 1e-1)

CLAIM = Claim(
    slug="lora-sb",
    paper="Ponkshe et al., 2024, arXiv 2411.19557",
    statement="LoRA-SB reaches a lower loss than LoRA-XS of the same rank, and than LoRA of four "
    "times its parameters",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", {"rank": 6, "alpha": 6}),
        Contender("lora-xs", "lora-xs", {"rank": 16, "alpha": 16}, rates=CORES),
        Contender("lora-sb", "lora-sb", {"rank": 16}, rates=CORES),
    ),
    judge=lambda found: all_of(
        compare(found, "lora-sb", "lora-xs"), compare(found, "lora-sb", "lora")
    ),
)

if __name__ == "__main__":
    main(CLAIM)
