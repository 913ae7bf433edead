"""NLoRA and StructuredLoRA beat LoRA, and NLoRA's start is cheaper than PiSSA's."""

import copy

import torch
from lab import Claim, Contender, at_most, compare, cpu_seconds, main, paired_ratio
from lab.verdict import all_of
from torch import nn

import plait


def start_cost(smoke):
    """CPU seconds to attach at rank 128 to a stack of 576 x 576 layers."""
    torch.manual_seed(0)
    base = nn.Sequential(*[nn.Linear(576, 576) for _ in range(2 if smoke else 16)])

    def attach(method):
        return lambda: plait.attach(copy.deepcopy(base), method, rank=128, seed=0)

    seconds = cpu_seconds({m: attach(m) for m in ("nlora", "pissa")}, rounds=2 if smoke else 9)
    return {"start": paired_ratio(seconds, "nlora", "pissa")}


CLAIM = Claim(
    slug="nlora",
    paper="Guo et al., 2025, arXiv 2502.14482",
    statement="StructuredLoRA and NLoRA each reach a lower loss than LoRA of the same rank, and "
    "NLoRA's start takes at most half of PiSSA's time",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", {"rank": 8, "alpha": 8}),
        Contender("slora", "structured-lora", {"rank": 8}),
        Contender("nlora", "nlora", {"rank": 8}),
    ),
    judge=lambda found: all_of(
        compare(found, "slora", "lora"),
        compare(found, "nlora", "lora"),
        at_most(found["measured"]["start"], 0.5, "time of NLoRA's start over PiSSA's"),
    ),
    measure=start_cost,
    note="The start is held back here, so that NLoRA too begins at the base.",
)

if __name__ == "__main__":
    main(CLAIM)
