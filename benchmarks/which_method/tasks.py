"""The tasks, as `plait compare` takes them (`benchmarks/which_method/tasks.py:DIGITS`).

    digits      8 x 8 pictures, turned and inverted, on a small ViT that knows them upright
    intent, sentiment, language     texts to one of several options, on all-MiniLM-L6-v2
    home        commands to JSON calls, on SmolLM2-135M

The encoder's tasks are those of the merging benchmark, with its scorer: a text's option is the
one whose embedding by the untouched base is nearest.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
for folder in (ROOT, ROOT / "benchmarks" / "claims"):
    if str(folder) not in sys.path:  # `benchmarks` and the claims' `lab`, wherever this is run from
        sys.path.insert(0, str(folder))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from plait.study import RecipeTask, Task  # noqa: E402
from plait.training.recipe import Recipe  # noqa: E402

TRAIN, VALIDATION, TEST = 600, 150, 300
"""Rows of each encoder task at most."""


class Digits(Task):
    """What the base saw, turned by a quarter and inverted."""

    name, metric = "digits", "accuracy"
    title = "digits turned and inverted, ViT of 4 layers"
    recipe = Recipe(
        method="lora",
        options={"rank": 4},
        targets=r"network\.layers\..*_proj",
        steps=150,
        batch_size=32,
        warmup=0.1,
    )

    def _task(self) -> Any:
        from lab.tasks import TASKS

        return TASKS["digits-vit"]

    def load(self) -> nn.Module:
        return self._task().fresh()

    def batches(self, seed: int) -> Iterator[Any]:
        return self._task().batches(seed)

    def validate(self, model: nn.Module) -> float:
        return self._task().score(model, "validation")["loss"]

    def scores(self, model: nn.Module) -> list[float]:
        data = self._task().splits()["test"]
        return (model(data["pixels"]).logits.argmax(-1) == data["labels"]).float().tolist()

    def facts(self) -> dict[str, Any]:
        return {part: len(rows["labels"]) for part, rows in self._task().splits().items()}


class Encoded(Task):
    """A task of the merging benchmark on the encoder that it uses."""

    metric = "accuracy"
    recipe = Recipe(
        method="lora",
        options={"rank": 8},
        targets=["query", "key", "value"],
        steps=80,
        batch_size=16,
        warmup=0.1,
    )

    def __init__(self, name: str) -> None:
        self.name, self.title = name, f"{name}, all-MiniLM-L6-v2"
        self._parts: dict[str, list[Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": None}

    def load(self) -> nn.Module:
        from benchmarks.merging.base import load_minilm
        from benchmarks.merging.scorer import Scorer

        return Scorer(load_minilm()[0]).eval()

    def parts(self) -> dict[str, list[Any]]:
        """Encoded rows of each split; options are embedded by an untouched base."""
        if self._parts is None:
            from benchmarks.merging.base import load_minilm
            from benchmarks.merging.scorer import Scorer, Words
            from benchmarks.merging.tasks import all_tasks

            encoder, tokenizer = load_minilm()
            words = Words(Scorer(encoder), tokenizer)
            task = next(t for t in all_tasks() if t.name == self.name)
            found = task.parts(TRAIN, VALIDATION, TEST)
            self._parts = {part: words.encode(task, rows) for part, rows in found.items()}
        return self._parts

    def batches(self, seed: int) -> Iterator[Any]:
        from benchmarks.merging.scorer import joined

        rows, draw, size = self.parts()["train"], random.Random(seed), self.recipe.batch_size
        while True:
            order = draw.sample(range(len(rows)), len(rows))
            for start in range(0, len(order) - size + 1, size):
                yield joined([rows[i] for i in order[start : start + size]])

    def validate(self, model: nn.Module) -> float:
        from benchmarks.merging.scorer import batches

        total, count = 0.0, 0
        for batch in batches(self.parts()["validation"]):
            total += float(model(**batch).loss) * len(batch["labels"])
            count += len(batch["labels"])
        return total / count

    def scores(self, model: nn.Module) -> Iterator[float]:
        from benchmarks.merging.scorer import joined

        rows = self.parts()["test"]
        for start in range(0, len(rows), 32):
            batch = joined(rows[start : start + 32])
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
            yield from (logits.argmax(-1) == batch["labels"]).float().tolist()

    def facts(self) -> dict[str, Any]:
        return {part: len(rows) for part, rows in self.parts().items()}


def home(folder: Path = ROOT / "runs" / "which-method" / "data") -> RecipeTask:
    """English home commands to JSON calls, as in the quickstart."""
    from plait.quickstart.tasks import TASKS as QUICKSTART

    if not (folder / "test.jsonl").is_file():
        QUICKSTART["home_en"].make(folder)
    recipe = Recipe(
        base="smollm2-135m",
        options={"rank": 8},
        data=str(folder / "train.jsonl"),
        eval_data=str(folder / "test.jsonl"),
        steps=60,
        batch_size=8,
        max_length=256,
    )
    task = RecipeTask(recipe, metric="loss", test_rows=100, validation_rows=32)
    task.name, task.title = "home", "home commands to JSON calls, SmolLM2-135M"
    return task


DIGITS = Digits()
TASKS: dict[str, Callable[[], Task]] = {
    "digits": lambda: DIGITS,
    "intent": lambda: Encoded("intent"),
    "sentiment": lambda: Encoded("sentiment"),
    "language": lambda: Encoded("language"),
    "home": home,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in list(TASKS)[:-1]:
        task = TASKS[name]()
        print(name, task.facts(), sum(task.scores(task.load().eval())))
