"""Bytes of optimiser state of SmolLM2-135M: AdamW beside GaLore, projectors included.

    python benchmarks/optimizer_state.py                    # rank 128
    python benchmarks/optimizer_state.py --rank 64 --model six-layer

Every contender takes one real step on random gradients, and the tensors that it then keeps are
counted: those of the linears in the blocks, which GaLore projects, and those of the whole model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from models import MODELS
from report import machine

import plait
from plait.rules.galore import Galore

GOALS = {"GaLore": 0.35, "GaLore, 8-bit": 0.20}
"""At most this share of AdamW's bytes on the projected matrices."""


def contenders(rank: int) -> dict[str, Galore | None]:
    """None is torch's AdamW on all weights."""
    return {
        "AdamW": None,
        "GaLore": Galore(rank=rank),
        "GaLore, Adafactor": Galore(rank=rank, inner="adafactor"),
        "GaLore, 8-bit": Galore(rank=rank, inner="adamw-8bit"),
        "GaLore, embedding too": Galore(rank=rank, embeddings=True),
        "GaLore, 8-bit, embedding too": Galore(rank=rank, inner="adamw-8bit", embeddings=True),
    }


def state_bytes(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of every tensor in the state of these parameters, step counts aside."""
    return sum(_bytes(v) for p in parameters for k, v in optimizer.state[p].items() if k != "step")


def _bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def one_step(model: nn.Module, rule: Galore | None) -> tuple[torch.optim.Optimizer, float]:
    """(The optimiser after a step on random gradients, the step's CPU seconds).

    Gradients come and go one by one, so that the model fits beside every contender's state.
    """
    if rule is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    else:
        optimizer = plait.RuleStack(model, [rule], lr=0.0).optimizer
    draw, seconds = torch.Generator().manual_seed(0), 0.0
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
        start = time.process_time()
        optimizer.step()
        seconds += time.process_time() - start
        parameter.grad = None
    return optimizer, seconds


def projected(model: nn.Module, rank: int) -> list[nn.Parameter]:
    groups = plait.RuleStack(model, [Galore(rank=rank)]).optimizer.param_groups
    return [p for group in groups if group["projected"] for p in group["params"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--rank", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = MODELS[args.model](torch.float32)
    inside = projected(model, args.rank)
    everything = list(model.parameters())
    count = lambda ps: f"{sum(p.numel() for p in ps):,} numbers"  # noqa: E731
    print(json.dumps({**machine(), "model": args.model, "rank": args.rank}))
    print(f"projected: {len(inside)} matrices, {count(inside)}; model: {count(everything)}\n")
    print(
        "| optimiser | projected, MB | of AdamW's | whole model, MB | of AdamW's | first step, s |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    base: tuple[int, int] | None = None
    for label, rule in contenders(args.rank).items():
        optimizer, seconds = one_step(model, rule)
        found = state_bytes(optimizer, inside), state_bytes(optimizer, everything)
        del optimizer
        base = base or found
        shares = [a / b for a, b in zip(found, base, strict=True)]
        cells = [f"{found[0] / 1e6:.1f}", f"{shares[0]:.3f}", f"{found[1] / 1e6:.1f}"]
        print("| " + " | ".join([label, *cells, f"{shares[1]:.3f}", f"{seconds:.1f}"]) + " |")
        if label in GOALS:
            verdict = "met" if shares[0] <= GOALS[label] else "MISSED"
            print(f"  goal {GOALS[label]:.2f} on projected matrices: {verdict}", file=sys.stderr)


if __name__ == "__main__":
    main()
