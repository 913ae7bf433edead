"""GaLore trains as well as AdamW on full gradients with a third of its state, and better than LoRA
of the same rank.
"""

import torch
from lab import Claim, Contender, at_most, compare, main
from lab.verdict import all_of
from torch import nn

import plait

RANK = 16
SHAPES = {"q": (576, 576), "k": (192, 576), "up": (1536, 576), "down": (576, 1536)}
"""Of SmolLM2-135M's layers, where the paper's rank for that size is 128."""


class Layers(nn.Module):
    def __init__(self, share: int) -> None:
        super().__init__()
        sides = {n: (out // share, wide // share) for n, (out, wide) in SHAPES.items()}
        self.linears = nn.ModuleDict(
            {n: nn.Linear(b, a, bias=False) for n, (a, b) in sides.items()}
        )


def state(optimizer: torch.optim.Optimizer) -> int:
    def count(value) -> int:
        if isinstance(value, dict):
            return sum(count(v) for k, v in value.items() if k != "step")
        return value.nbytes if isinstance(value, torch.Tensor) else 0

    return sum(count(kept) for kept in optimizer.state.values())


def measure(smoke: bool):
    """Bytes of state after a step on random gradients, bases included, over AdamW's."""
    share = 4 if smoke else 1
    sides = {"adamw": None, "galore": "adamw", "galore-8bit": "adamw-8bit"}
    kept = {}
    for label, inner in sides.items():
        torch.manual_seed(0)
        model = Layers(share)
        optimizer = torch.optim.AdamW(model.parameters())
        if inner is not None:
            rule = {"galore": {"rank": 128 // share, "inner": inner}}
            optimizer = plait.RuleStack(model, [rule]).optimizer
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        kept[label] = state(optimizer)
    return {f"{n}_state_ratio": kept[n] / kept["adamw"] for n in ("galore", "galore-8bit")}


CLAIM = Claim(
    slug="galore",
    paper="Zhao et al., 2024, arXiv 2403.03507",
    statement="GaLore ends within two points of the accuracy of full AdamW and above LoRA of the "
    "same rank, with at most 0.35 of AdamW's state, in 8 bits 0.2",
    task="digits-shuffled",
    contenders=(
        Contender("full", "full"),
        Contender(
            "galore",
            "full",
            rules=({"galore": {"rank": RANK, "interval": 20}},),
            rates=(3e-3, 1e-2, 3e-2, 1e-1),
        ),
        Contender("lora", "lora", {"rank": RANK, "alpha": RANK}),
    ),
    measure=measure,
    judge=lambda found: all_of(
        compare(found, "galore", "full", "accuracy", margin=0.02),
        compare(found, "galore", "lora", "accuracy"),
        at_most(found["measured"]["galore_state_ratio"], 0.35, "state over AdamW's"),
        at_most(found["measured"]["galore-8bit_state_ratio"], 0.2, "in 8 bits"),
    ),
    note="The paper's subspaces last 200 of many thousand steps, here 20 of 300. State is counted "
    "on matrices of SmolLM2-135M's shapes at rank 128.",
)

if __name__ == "__main__":
    main(CLAIM)
