"""`plait train --method X` for every X, on the quickstart's data: does it run, and does it learn?

    python benchmarks/train_every_method.py                    # SmolLM2-135M, resumable
    python benchmarks/train_every_method.py --only lora-sb nola --steps 20

Every method is trained by the recipe that the command line would make of its name alone, at the
first of a few learning rates at which its loss falls. One JSON line a method is kept in
benchmarks/results/train-every-method.jsonl; methods that stand there are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import machine

from plait.adapter.registry import get_method, names
from plait.quickstart.tasks import TASKS
from plait.training.recipe import Recipe
from plait.training.trainer import train

RESULTS = Path(__file__).parent / "results" / "train-every-method.jsonl"
RATES = (2e-3, 2e-2, 2e-4, 2e-1)


def attempt(name: str, rate: float, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Losses of one short run: of its first step, where nothing moved yet, and its last quarter."""
    method = get_method(name)
    values = {
        "base": args.base,
        "dtype": "bfloat16",
        "data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "few.jsonl"),  # which some rules learn from
        "steps": args.steps,
        "lr": rate,
        "batch_size": 4,
        "max_length": 128,
        "show_examples": 0,
        "log_every": 1,
        "parity": False,
        "output": str(folder / f"{name}-{rate:g}"),
        "method": "none" if method.axis == "rule" and not method.rule.needs_adapter else name,
    }
    if method.axis == "rule":
        values["rules"] = [name]
        values["method"] = "lora" if method.rule.needs_adapter else "none"
    if method.rule is not None and not method.rule.needs_adapter:
        values["dtype"] = "float32"
    start = time.process_time()
    result = train(Recipe.make(values))
    losses = [h["loss"] for h in result.history if "loss" in h]
    quarter = max(1, len(losses) // 4)
    return {
        "method": name,
        "rate": rate,
        "first": round(losses[0], 4),
        "last": round(statistics.fmean(losses[-quarter:]), 4),
        "seconds": round(time.process_time() - start, 1),
    }


def best(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The first rate at which the loss falls by a tenth, or the best of all."""
    tried = []
    for rate in RATES:
        try:
            tried.append(attempt(name, rate, args, folder))
        except Exception as e:
            return {"method": name, "error": f"{type(e).__name__}: {e}"}
        if tried[-1]["last"] < 0.9 * tried[-1]["first"]:
            break
    return min(tried, key=lambda t: t["last"] / t["first"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", nargs="+", default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = []
    if RESULTS.is_file():
        done = [json.loads(line)["method"] for line in RESULTS.read_text().splitlines()]
    wanted = args.only or [name for name in names() if name not in done]
    with tempfile.TemporaryDirectory() as temporary:
        TASKS["home_en"].make(temporary)
        held_out = (Path(temporary) / "test.jsonl").read_text().splitlines()[:8]
        (Path(temporary) / "few.jsonl").write_text("\n".join(held_out) + "\n")
        for name in wanted:
            found = {**best(name, args, Path(temporary)), "date": machine()["date"]}
            print(json.dumps(found), flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
