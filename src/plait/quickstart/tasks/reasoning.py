"""Number sorting from reasoning-gym: a small skill that a small model can be taught in minutes.

    "Sort in descending order: 56, 25, 75"  ──►  "75, 56, 25"

reasoning-gym (Apache-2.0) makes the problems; its question, most of which explains an output
format, is reworded to one line, since every token costs time on a CPU. Train and test come from
different seeds and share no question. The metric is the exact match of the list.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from plait.quickstart.tasks.task import Row, Task, reference, row

SYSTEM = "Answer only."
TRAIN_ROWS, TEST_ROWS = 1200, 120
SETTINGS = {"min_numbers": 3, "max_numbers": 5, "min_value": 10, "max_value": 99}


def generate(seed: int) -> tuple[list[Row], list[Row]]:
    """Train and test rows; no question in both."""
    # Seeds for the two parts that no other seed of ours shares.
    train_seed, test_seed = random.Random(f"reasoning/{seed}").sample(range(2**31), 2)
    train = _problems(train_seed, TRAIN_ROWS, taken={})
    test = _problems(test_seed, TEST_ROWS, taken=train)
    return [row(SYSTEM, *pair) for pair in train.items()], [
        row(SYSTEM, *pair) for pair in test.items()
    ]


def score(prediction: str, row: Mapping[str, Any]) -> bool:
    """Whether the prediction is the reference list (white space aside)."""
    return _numbers(prediction) == _numbers(reference(row))


def _numbers(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _problems(seed: int, count: int, taken: Mapping[str, str]) -> dict[str, str]:
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise ImportError(
            "the reasoning task needs reasoning-gym; run `pip install 'plait[demo]'`"
        ) from error
    decimals = {"min_decimals": 0, "max_decimals": 0}
    source = create_dataset("number_sorting", seed=seed, size=4 * count, **SETTINGS, **decimals)
    found: dict[str, str] = {}
    for entry in source:
        facts = entry["metadata"]
        given, ordered = _integers(facts["original_numbers"]), _integers(facts["sorted_numbers"])
        question = f"Sort in {facts['direction']} order: {given}"
        if question not in taken:
            found[question] = ordered
        if len(found) == count:
            return found
    raise RuntimeError(f"reasoning: reasoning-gym gave only {len(found)} of {count} questions")


def _integers(numbers: list[str]) -> str:
    return ", ".join(str(int(float(number))) for number in numbers)


REASONING = Task(
    name="reasoning",
    title="Sorting numbers (reasoning-gym)",
    language="en",
    metric="exact match of the list",
    max_new_tokens=32,
    generate=generate,
    score=score,
)
