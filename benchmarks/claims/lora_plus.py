"""LoRA+ needs fewer steps than LoRA, and ends better."""

import statistics

from lab import Claim, Contender, compare, main
from lab.verdict import all_of, at_most
from lora_ga import steps_to

LORA = {"rank": 8, "alpha": 16}


def judge(found):
    sides = {name: side["trials"] for name, side in found["contenders"].items()}
    shares = []
    for ours, theirs in zip(sides["lora-plus"], sides["lora"], strict=True):
        goal = statistics.fmean(theirs["curve"][-20:])
        shares.append(steps_to(ours["curve"], goal) / len(theirs["curve"]))
    return all_of(
        at_most(statistics.fmean(shares), 0.5, "share of the steps to LoRA's last loss"),
        compare(found, "lora-plus", "lora"),
    )


CLAIM = Claim(
    slug="lora-plus",
    paper="Hayou et al., 2024, arXiv 2402.12354",
    statement="with B sixteen times as fast as A, LoRA's final training loss is reached in at most "
    "half of the steps, and the loss at the end is lower",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", LORA),
        Contender("lora-plus", "lora", LORA, rules=("lora-plus",), rates=(1e-4, 3e-4, 1e-3, 3e-3)),
    ),
    judge=judge,
    note="A's rates are lower than LoRA's, as the paper advises.",
)

if __name__ == "__main__":
    main(CLAIM)
