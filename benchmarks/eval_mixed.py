"""Eight adapters on one data set: one mixed pass beside single passes and beside the base alone.

    python benchmarks/eval_mixed.py [--base smollm2-135m] [--rows 4] [--rank 16]

Prints CPU seconds (one thread) of reading answers (loss) and of writing them (greedy), for

    base      the base alone over as many rows (eight times the data set)
    mixed     all adapters in one pass, their rows side by side in every batch
    one by one

interleaved twice, the least of each, and the largest difference of any example's score.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import torch

import plait
from plait.evaluation import evaluate
from plait.training.bases import load_base

COUNT = 8


def questions(count: int) -> list[dict[str, str]]:
    """Sums in words: prompts of different lengths, answers of a few tokens."""
    names = ["Ann", "Bo", "Carla", "Dimitri", "Eve"]
    return [
        {
            "prompt": f"{names[i % 5]} has {i + 2} apples and buys {3 * i + 1} more, "
            + "then eats one, " * (i % 4)
            + "how many are there now? Answer with a number.",
            "completion": f"There are {4 * i + 3 - i % 4} apples now.",
        }
        for i in range(count)
    ]


def attach_all(model: Any, rank: int) -> list[str]:
    names = [f"adapter-{i}" for i in range(COUNT)]
    for seed, name in enumerate(names):
        adapter = plait.attach(model, "lora", name=name, rank=rank, seed=seed, targets="all-linear")
        draw = torch.Generator().manual_seed(seed)
        for key, parameter in adapter.named_parameters():
            if key.endswith(".B"):
                parameter.data = 0.01 * torch.randn(parameter.shape, generator=draw)
    return names


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--metric", nargs="+", default=["loss", "exact_match"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_base(given.base)
    names, rows = attach_all(model, given.rank), questions(given.rows)
    for metric in given.metric:
        run = functools.partial(
            evaluate,
            model,
            tokenizer,
            metrics=metric,
            batch_size=given.batch_size,
            max_new_tokens=given.new_tokens,
        )
        works = {
            "base": functools.partial(run, rows * COUNT, adapters=["base"]),
            "mixed": functools.partial(run, rows, adapters=names, mixed=True),
            "one by one": functools.partial(run, rows, adapters=names),
        }
        seconds: dict[str, float] = {}
        found: dict[str, Any] = {}
        for _ in range(2):
            for name, work in works.items():
                spent, found[name] = timed(work)
                seconds[name] = min(spent, seconds.get(name, spent))
        print(json.dumps(facts(metric, seconds, found)), flush=True)


def facts(metric: str, seconds: dict[str, float], found: dict[str, Any]) -> dict[str, Any]:
    pairs = list(zip(found["mixed"].results, found["one by one"].results, strict=True))
    worst = max(
        abs(a - b)
        for one, other in pairs
        for a, b in zip(one.values[metric], other.values[metric], strict=True)
    )
    same = all(one.predictions == other.predictions for one, other in pairs)
    distinct = len({tuple(one.predictions or one.values[metric]) for one, _ in pairs})
    return {
        "metric": metric,
        "cpu_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "mixed_over_base": round(seconds["mixed"] / seconds["base"], 3),
        "one_by_one_over_base": round(seconds["one by one"] / seconds["base"], 3),
        "largest_difference": worst,
        "same_answers": same,
        "adapters_that_differ": distinct,
    }


if __name__ == "__main__":
    main()
