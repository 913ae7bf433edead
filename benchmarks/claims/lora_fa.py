"""LoRA-FA learns as well as LoRA and keeps far fewer activations."""

import torch
from lab import Claim, Contender, at_most, compare, main
from lab.memory import saved_bytes
from lab.verdict import all_of
from torch import nn

import plait

RANK = {"rank": 8, "alpha": 16}


def measure(smoke: bool):
    """Bytes that backward keeps of a stack of linears, beside what the base itself keeps (none)."""
    size, depth, tokens = (64, 2, 32) if smoke else (768, 12, 1024)
    kept = {}
    for label, rules in {"lora": [], "lora-fa": ["lora-fa"]}.items():
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(size, size) for _ in range(depth)))
        plait.attach(model, "lora", seed=0, **RANK)
        plait.RuleStack(model.train(), rules, lr=1e-3)
        kept[label] = saved_bytes(model, torch.randn(tokens, size))
    return {"saved_ratio": kept["lora-fa"] / kept["lora"]} | {
        f"{label}_saved_mb": count / 1e6 for label, count in kept.items()
    }


CLAIM = Claim(
    slug="lora-fa",
    paper="Zhang et al., 2023, arXiv 2308.03303",
    statement="with A frozen accuracy stays within two points of LoRA's, and backward keeps at "
    "most a tenth of its activations",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", RANK),
        Contender("lora-fa", "lora", RANK, rules=("lora-fa",)),
    ),
    measure=measure,
    judge=lambda found: all_of(
        compare(found, "lora-fa", "lora", "accuracy", margin=0.02),
        at_most(found["measured"]["saved_ratio"], 0.1, "activations kept, of LoRA's"),
    ),
)

if __name__ == "__main__":
    main(CLAIM)
