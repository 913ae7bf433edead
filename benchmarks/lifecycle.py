"""Attach, save, load, switch, fuse: wall seconds of Plait and PEFT with 1, 10 and 50 adapters on a
model.

    python benchmarks/lifecycle.py --adapters 1 10 50 --rank 16

SmolLM2-135M, all linear layers. Every operation is repeated (median of --repeats), Plait and PEFT
in turn in one process over the same weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from models import MODELS, twin
from report import machine

import plait

Operation = Callable[[], object]


class PlaitLife:
    """The operations on a model that already carries `count` adapters."""

    def __init__(self, model: torch.nn.Module, count: int, rank: int, folder: Path) -> None:
        self.model, self.rank, self.folder = model, rank, folder
        for i in range(count):
            self.last = plait.attach(model, "lora", rank=rank, name=f"a{i}", seed=i)
        self.turn = 0

    def attach(self) -> None:
        plait.attach(self.model, "lora", rank=self.rank, name="new", seed=0)

    def undo_attach(self) -> None:
        plait.detach(self.model, "new")
        plait.activate(self.model, "a0")

    def save(self) -> None:
        self.last.save(self.folder / "plait", format="peft")

    def load(self) -> None:
        plait.load(self.model, self.folder / "plait", name="new")

    undo_load = undo_attach

    def switch(self) -> None:
        self.turn ^= 1
        plait.activate(self.model, "a0" if self.turn else self.last.name)

    def fuse(self) -> None:
        plait.fuse(self.model)

    def undo_fuse(self) -> None:
        self.unfuse()

    def unfuse(self) -> None:
        plait.unfuse(self.model)


class PeftLife:
    def __init__(self, model: torch.nn.Module, count: int, rank: int, folder: Path) -> None:
        from peft import LoraConfig, get_peft_model

        self.config = lambda: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        self.folder, self.turn, self.last = folder, 0, f"a{count - 1}"
        self.model = get_peft_model(model, self.config(), adapter_name="a0")
        for i in range(1, count):
            self.model.add_adapter(f"a{i}", self.config())

    def attach(self) -> None:
        self.model.add_adapter("new", self.config())
        self.model.set_adapter("new")

    def undo_attach(self) -> None:
        self.model.delete_adapter("new")
        self.model.set_adapter("a0")

    def save(self) -> None:
        self.model.save_pretrained(self.folder / "peft", selected_adapters=["a0"])

    def load(self) -> None:
        self.model.load_adapter(self.folder / "peft" / "a0", "new")
        self.model.set_adapter("new")

    undo_load = undo_attach

    def switch(self) -> None:
        self.turn ^= 1
        self.model.set_adapter("a0" if self.turn else self.last)

    def fuse(self) -> None:
        self.model.merge_adapter()

    def undo_fuse(self) -> None:
        self.model.unmerge_adapter()


def timed(life: object, operation: str) -> float:
    start = time.perf_counter()
    getattr(life, operation)()
    seconds = time.perf_counter() - start
    undo = getattr(life, f"undo_{operation}", None)
    if undo is not None:
        undo()
    return seconds


def measure(args: argparse.Namespace, count: int, folder: Path) -> list[dict]:
    base = MODELS["smollm2"](torch.float32)
    lives = {
        "plait": PlaitLife(twin(base), count, args.rank, folder),
        "peft": PeftLife(twin(base), count, args.rank, folder),
    }
    rows = []
    for operation in ("attach", "save", "load", "switch", "fuse"):
        seconds = {name: [] for name in lives}
        for _ in range(args.repeats):
            for name, life in lives.items():
                seconds[name].append(timed(life, operation))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        rows.append({"operation": operation, "adapters": count, **medians})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(machine()))
    with tempfile.TemporaryDirectory() as folder:
        for count in args.adapters:
            for row in measure(args, count, Path(folder)):
                ratio = row["peft"] / row["plait"]
                print(json.dumps({**row, "peft_over_plait": round(ratio, 1)}), flush=True)


if __name__ == "__main__":
    main()
