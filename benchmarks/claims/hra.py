"""HRA beats LoRA and OFT of its size."""

from lab import Claim, Contender, compare, main
from lab.verdict import all_of

CLAIM = Claim(
    slug="hra",
    paper="Yuan et al., 2024, arXiv 2405.17484",
    statement="at equal parameters a chain of reflections beats LoRA and OFT",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", {"rank": 2, "alpha": 2}),
        Contender("oft", "oft", {"block_size": 8}),
        Contender("hra", "hra", {"rank": 4}),
    ),
    judge=lambda found: all_of(compare(found, "hra", "lora"), compare(found, "hra", "oft")),
    note="OFT has one in eight numbers less.",
)

if __name__ == "__main__":
    main(CLAIM)
