"""LoRA-RITE learns better than Adam, and takes the same steps however the factors are scaled."""

from lab import Claim, Contender, at_most, compare, main
from lab.rescaling import rescaling_effect
from lab.verdict import all_of

RANK = {"rank": 4, "alpha": 4}


def measure(smoke: bool):
    steps = {"warm": 3, "steps": 3} if smoke else {}
    ours = rescaling_effect(["lora-rite"], 3e-3, **steps)
    adam = rescaling_effect([], 3e-3, **steps)
    return {"lora_rite": ours, "adamw": adam, "ratio": ours / adam}


CLAIM = Claim(
    slug="lora-rite",
    paper="Yen et al., 2024, arXiv 2410.20625",
    statement="LoRA-RITE ends at a lower loss than AdamW; multiplying A by 10 and B by 0.1 changes "
    "its loss after 50 steps by at most a thousandth, and by a fiftieth of what AdamW's changes",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", RANK),
        Contender("lora-rite", "lora", RANK, rules=("lora-rite",)),
    ),
    measure=measure,
    judge=lambda found: all_of(
        compare(found, "lora-rite", "lora"),
        at_most(found["measured"]["lora_rite"], 1e-3, "change of the loss under a rescaling"),
        at_most(found["measured"]["ratio"], 0.02, "the same, of AdamW's"),
    ),
    note="The paper compares on Gemma-2B; what it says of invariance is exact at any size.",
)

if __name__ == "__main__":
    main(CLAIM)
