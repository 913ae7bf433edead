"""S2-LoRA keeps LoRA's quality with factors that all layers share."""

from lab import Claim, Contender, compare, figures, main
from lab.verdict import all_of, at_most

CLAIM = Claim(
    slug="s2-lora",
    paper="Liu et al., 2023, arXiv 2309.11756",
    statement="with a fifth of the parameters of LoRA r=8, S2-LoRA comes within 0.1 of its loss, "
    "and below LoRA r=1",
    task="digits-vit",
    contenders=(
        Contender("lora r=8", "lora", {"rank": 8, "alpha": 8}),
        Contender("lora r=1", "lora", {"rank": 1, "alpha": 1}),
        Contender("s2-lora", "s2-lora", {"rank": 8}),
    ),
    judge=lambda found: all_of(
        compare(found, "s2-lora", "lora r=8", margin=0.1),
        compare(found, "s2-lora", "lora r=1"),
        at_most(
            figures(found, "s2-lora", "parameters")[0]
            / figures(found, "lora r=8", "parameters")[0],
            0.2,
            "S2-LoRA's parameters over LoRA's",
        ),
    ),
    note="The paper shares over a whole Whisper and compares with AdaLoRA; here four layers share.",
)

if __name__ == "__main__":
    main(CLAIM)
