"""Flexora: half the blocks, chosen on held-out data, do what all of them do."""

from lab import Claim, Contender, compare, main
from lab.verdict import all_of

LORA = {"rank": 8, "alpha": 16}
RULE = {"search": 0.4, "keep": 2, "batches": 2, "interval": 2, "alpha_lr": 0.05}

CLAIM = Claim(
    slug="flexora",
    paper="Wei et al., 2024, arXiv 2408.10774",
    statement="with few labels, LoRA in the half of the blocks that Flexora chooses is no less "
    "accurate than LoRA in all of them, and more than in every other block",
    task="digits-few",
    contenders=(
        Contender("flexora", "lora", LORA, rules=({"flexora": RULE},)),
        Contender("lora, all blocks", "lora", LORA),
        Contender(
            "lora, blocks 0 and 2", "lora", {**LORA, "targets": r"network\.layers\.[02].*_proj"}
        ),
        Contender(
            "lora, blocks 1 and 3", "lora", {**LORA, "targets": r"network\.layers\.[13].*_proj"}
        ),
    ),
    seeds=(0, 1, 2),
    judge=lambda found: all_of(
        compare(found, "flexora", "lora, all blocks", "accuracy", margin=0.01),
        compare(found, "flexora", "lora, blocks 0 and 2", "accuracy"),
        compare(found, "flexora", "lora, blocks 1 and 3", "accuracy"),
    ),
    note="Two of four blocks stay. Blocks are chosen on the 300 held-out digits on which every "
    "side's learning rate is chosen too. Flexora's search takes the first 80 of its 200 steps; its "
    "blocks then start anew, under what is left of the schedule.",
)

if __name__ == "__main__":
    main(CLAIM)
