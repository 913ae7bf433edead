"""LISA is as good as full training, and better than LoRA, with few blocks training at a time."""

from lab import Claim, Contender, compare, main
from lab.verdict import all_of

CLAIM = Claim(
    slug="lisa",
    paper="Pan et al., 2024, arXiv 2403.17919",
    statement="training two of four blocks at a time, drawn anew every ten steps, ends above "
    "LoRA's accuracy and within two points of full training's",
    task="digits-vit",
    contenders=(
        Contender("full", "full"),
        Contender("lisa", "full", rules=({"lisa": {"blocks": 2, "interval": 10}},)),
        Contender("lora", "lora", {"rank": 8, "alpha": 16}),
    ),
    judge=lambda found: all_of(
        compare(found, "lisa", "lora", "accuracy"),
        compare(found, "lisa", "full", "accuracy", margin=0.02),
    ),
    note="The paper draws one to four of 32 to 80 blocks; embedding and head always train.",
)

if __name__ == "__main__":
    main(CLAIM)
