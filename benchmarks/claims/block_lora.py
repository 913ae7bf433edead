"""Block-LoRA is as good as LoRA for few labelled pictures, with fewer parameters."""

from lab import Claim, Contender, at_most, compare, main
from lab.verdict import all_of


def judge(found):
    size = {name: side["parameters"] for name, side in found["contenders"].items()}
    share = size["block-lora"] / size["lora"]
    return all_of(
        compare(found, "block-lora", "lora", "accuracy", margin=0.01),
        at_most(share, 0.6, "parameters over LoRA's"),
    )


CLAIM = Claim(
    slug="block-lora",
    paper="Zhou et al., 2025, arXiv 2501.16720",
    statement="with six pictures a class Block-LoRA is within a point of LoRA's accuracy at 0.6 of "
    "its parameters",
    task="digits-few",
    contenders=(
        Contender("lora", "lora", {"rank": 2, "alpha": 2}),
        Contender("block-lora", "block-lora", {"rank": 2, "alpha": 2, "blocks": 8}),
    ),
    judge=judge,
    note="The paper adapts CLIP; here a small ViT.",
)

if __name__ == "__main__":
    main(CLAIM)
