"""How long starts take on SmolLM2-135M: CPU seconds of attaching, and of the pass over data in it.

    python benchmarks/start_time.py
    python benchmarks/start_time.py pissa lora-ga

One thread, float32, every linear layer (210 sites). The pass over data (statistics) sees four
batches of 2 x 64 random tokens; what it costs grows with the data, the rest does not.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from models import random_batch, smollm2
from report import machine

import plait
from plait.adapter.registry import get_method

STARTS = (
    *("pissa", "olora", "nlora", "int-tune", "lora-ga", "lora-sb", "eva", "corda", "loftq"),
    *("lora-xs", "lamda", "lamda-plus-plus", "salt", "kasa", "comp-lora", "loldu", "soka"),
)


def measure(model: torch.nn.Module, name: str, data: list[Any]) -> dict[str, Any]:
    """CPU seconds of attaching `name`: in all, in its pass over data, and beyond it."""
    method, spent = get_method(name), [0.0]
    start = method.initializer() if method.initializer is not None else None
    if start is not None:
        collect = start.collect

        def timed(*args: Any) -> Any:
            begun = time.process_time()
            try:
                return collect(*args)
            finally:
                spent[0] += time.process_time() - begun

        start.collect = timed  # type: ignore[method-assign]
    begun = time.process_time()
    plait.attach(model, name, name="timed", initializer=start, data=data)
    total = time.process_time() - begun
    plait.detach(model, "timed")
    return {"method": name, "total": total, "data": spent[0], "beyond": total - spent[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=STARTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = smollm2(torch.float32)
    data = [random_batch(model, rows=2, tokens=64) for _ in range(4)]
    print(json.dumps(machine()))
    for name in args.methods:
        found = measure(model, name, data)
        print(json.dumps({k: round(v, 2) if k != "method" else v for k, v in found.items()}))


if __name__ == "__main__":
    main()
