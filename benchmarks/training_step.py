"""Cost of a LoRA training step: Plait, PEFT and the frozen-base lower bound, in one run.

    python benchmarks/training_step.py --model six-layer --rank 8
    python benchmarks/training_step.py --model smollm2 --rank 8 --dtype bfloat16 --rounds 9
    python benchmarks/training_step.py --memory --model smollm2 --rank 8

The bound is the frozen base's forward and backward of activations alone: what any adapter must pay.
Rounds are interleaved (bound, Plait, PEFT, bound, ...) in one process over the same weights, in CPU
seconds of one thread, and the figure is the median of the paired ratios, so that a machine
whose speed drifts does not bend it. `--memory` runs each in a process of its own and reads its
peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from models import MODELS, frozen, random_batch, twin
from report import machine, peak_megabytes

import plait

Step = Callable[[], None]


def bound_step(args: argparse.Namespace, model: torch.nn.Module, batch: dict) -> Step:
    def step() -> None:
        model(**batch).loss.backward()

    return step


def plait_step(args: argparse.Namespace, model: torch.nn.Module, batch: dict) -> Step:
    adapter = plait.attach(
        model, "lora", rank=args.rank, alpha=2 * args.rank, dropout=args.dropout, seed=0
    )
    model.train()
    parameters = list(adapter.parameters())
    return _training(model, batch, parameters)


def peft_step(args: argparse.Namespace, model: torch.nn.Module, batch: dict) -> Step:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=args.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config).train()
    return _training(wrapped, batch, [p for p in wrapped.parameters() if p.requires_grad])


def _training(model: torch.nn.Module, batch: dict, parameters: list) -> Step:
    def step() -> None:
        model(**batch).loss.backward()
        for parameter in parameters:
            parameter.grad = None

    return step


STEPS = {"bound": bound_step, "plait": plait_step, "peft": peft_step}


def make_step(name: str, args: argparse.Namespace, base: torch.nn.Module) -> Step:
    model = frozen(twin(base))
    return STEPS[name](args, model, random_batch(model))


def compare(args: argparse.Namespace) -> dict[str, float]:
    """Median CPU seconds of the bound, and each contender's median ratio to it."""
    base = MODELS[args.model](getattr(torch, args.dtype))
    steps = {name: make_step(name, args, base) for name in STEPS}
    for step in steps.values():  # warm-up, and the second pass learns nothing new
        step(), step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    ratios = {
        f"{name}_ratio": statistics.median(
            a / b for a, b in zip(seconds[name], seconds["bound"], strict=True)
        )
        for name in ("plait", "peft")
    }
    return {"bound_seconds": statistics.median(seconds["bound"]), **ratios}


def memory(args: argparse.Namespace) -> dict[str, float]:
    """Peak resident megabytes of each contender in a process of its own (three steps)."""
    found = {}
    for name in STEPS:
        command = [sys.executable, __file__, "--only", name, *_flags(args)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[f"{name}_peak_mb"] = float(done.stdout.strip().splitlines()[-1])
    return found


def _flags(args: argparse.Namespace) -> list[str]:
    keys = ("model", "rank", "dropout", "dtype")
    return [flag for key in keys for flag in (f"--{key}", str(getattr(args, key)))]


def only(args: argparse.Namespace) -> None:
    step = make_step(args.only, args, MODELS[args.model](getattr(torch, args.dtype)))
    for _ in range(3):
        step()
    print(peak_megabytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="six-layer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--only", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only:
        return only(args)
    result = memory(args) if args.memory else compare(args)
    setting = {k: getattr(args, k) for k in ("model", "rank", "dropout", "dtype")}
    print(json.dumps({**machine(), **setting, **{k: round(v, 4) for k, v in result.items()}}))


if __name__ == "__main__":
    main()
