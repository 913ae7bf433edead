"""Bone and MiSS learn faster than LoRA at equal parameters."""

from lab import Claim, Contender, compare, main
from lab.verdict import all_of

# r rows of LoRA on a 64 x 64 projection cost 128 r numbers, MiSS's 64 x r block 64 r.
CLAIM = Claim(
    slug="bone",
    paper="Kang and Yin, 2024, arXiv 2409.15371",
    statement="Bone (MiSS) reaches a lower loss than LoRA at equal parameters, each tuned",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", {"rank": 2, "alpha": 2}),
        Contender("miss", "bone", {"rank": 4, "variant": "miss"}),
        Contender("pissa", "lora", {"rank": 2, "alpha": 2}, initializer="pissa"),
    ),
    judge=lambda found: all_of(compare(found, "miss", "lora"), compare(found, "miss", "pissa")),
    note="The paper's comparison is with LoRA and PiSSA on LLaMA2-7B.",
)

if __name__ == "__main__":
    main(CLAIM)
