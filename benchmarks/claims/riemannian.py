"""Preconditioning makes LoRA's training better, and blind to the scale of its factors."""

import torch
from lab import Claim, Contender, at_most, compare, main
from lab.rescaling import rescaling_effect
from lab.verdict import all_of

RANK = {"rank": 4, "alpha": 4}


def measure(smoke: bool):
    steps = {"warm": 3, "steps": 3} if smoke else {}
    ours = rescaling_effect(["riemannian"], 0.1, torch.optim.SGD, **steps)
    plain = rescaling_effect([], 0.1, torch.optim.SGD, **steps)
    return {"preconditioned": ours, "plain": plain, "ratio": ours / plain}


CLAIM = Claim(
    slug="riemannian",
    paper="Zhang and Pilanci, 2024, arXiv 2402.02347",
    statement="AdamW on preconditioned gradients ends at a lower loss than AdamW; SGD on them is "
    "moved by a rescaling of A by 10 and B by 0.1 at most a tenth as much as plain SGD",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", RANK),
        Contender("riemannian", "lora", RANK, rules=("riemannian",)),
    ),
    measure=measure,
    judge=lambda found: all_of(
        compare(found, "riemannian", "lora"),
        at_most(found["measured"]["ratio"], 0.1, "effect of a rescaling on 50 steps, of SGD's"),
    ),
    note="The effect is the change of the training loss after 50 steps, as a share of it.",
)

if __name__ == "__main__":
    main(CLAIM)
