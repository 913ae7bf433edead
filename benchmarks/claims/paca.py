"""PaCA's step is faster than LoRA's and keeps fewer activations."""

import torch
from lab import Claim, cpu_seconds, main, paired_ratio
from lab.memory import saved_bytes
from lab.verdict import all_of, at_most
from torch import nn

import plait


def build(method: str, size: int, depth: int, **options):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(depth))).requires_grad_(False)
    plait.attach(model, method, seed=0, **options)
    return model.train()


def measure(smoke: bool):
    size, depth, tokens = (64, 2, 32) if smoke else (768, 12, 1024)
    x = torch.randn(tokens, size)
    models = {
        "paca": build("paca", size, depth, rank=16),
        "lora": build("lora", size, depth, rank=8),
    }

    def step(model):
        model(x).square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    seconds = cpu_seconds(
        {name: lambda model=model: step(model) for name, model in models.items()},
        rounds=3 if smoke else 21,
    )
    kept = {name: saved_bytes(model, x) for name, model in models.items()}
    return {
        "step_ratio": paired_ratio(seconds, "paca", "lora"),
        "saved_ratio": kept["paca"] / kept["lora"],
        **{f"{name}_saved_mb": size / 1e6 for name, size in kept.items()},
    }


CLAIM = Claim(
    slug="paca",
    paper="Woo et al., 2025, arXiv 2503.01905",
    statement="at equal parameters a PaCA step takes at most 0.9 of LoRA's time and keeps at most "
    "0.84 of its memory for backward",
    measure=measure,
    judge=lambda found: all_of(
        at_most(found["measured"]["step_ratio"], 0.9, "step time over LoRA's"),
        at_most(found["measured"]["saved_ratio"], 0.84, "activations kept over LoRA's"),
    ),
    note="Twelve linears of 768, 1,024 tokens; Plait's fused LoRA is a faster peer than the "
    "paper's.",
)

if __name__ == "__main__":
    main(CLAIM)
