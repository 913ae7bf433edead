"""The tasks of a search: rows from the command line, by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.errors import PlaitError

Tasks = dict[str, list[Any]]
"""{task: its questions}."""


def read_tasks(specs: Sequence[str], limit: int | None = None) -> Tasks:
    """{task: questions} of TASK=FILE words; one name several times joins its files."""
    from plait.evaluation import read_questions

    files: dict[str, list[str]] = {}
    named: set[str] = set()
    for spec in specs:
        task, equals, file = spec.partition("=")
        if not equals or Path(spec).exists():
            task, file = Path(spec).stem, spec
            if task in files:
                raise PlaitError(f"two tasks are called {task!r}; write TASK=FILE for {spec}.")
        elif task in files and task not in named:
            raise PlaitError(f"two tasks are called {task!r}; write TASK=FILE for both.")
        if equals:
            named.add(task)
        files.setdefault(task, []).extend(_rows(file))
    return {task: read_questions(paths)[:limit] for task, paths in files.items()}


def _rows(file: str) -> list[str]:
    """The .jsonl files; a recipe stands for what it evaluates on, or else trains on."""
    if Path(file).suffix not in (".yaml", ".yml"):
        return [file]
    from plait.training.recipe import Recipe

    recipe = Recipe.load(file)
    found = recipe.eval_data if recipe.eval_data is not None else recipe.data
    if not found:
        raise PlaitError(f"recipe {file} has neither eval_data nor data.")
    return [found] if isinstance(found, str) else list(found)


def digest_of(tasks: Tasks) -> dict[str, str]:
    """{task: a fingerprint of its rows}."""
    found = {}
    for task, questions in tasks.items():
        rows = [[repr(q.example), q.answer, list(q.choices)] for q in questions]
        found[task] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    return found


def digest_of_adapters(adapters: Mapping[str, Any]) -> dict[str, str]:
    """{name: a fingerprint of its tensors}."""
    import torch

    found = {}
    for name, adapter in adapters.items():
        seen = hashlib.sha256(adapter.method.name.encode())
        for key, tensor in sorted(adapter.state_dict().items()):
            seen.update(key.encode())
            seen.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        found[name] = seen.hexdigest()[:16]
    return found


def batches_of(tasks: Tasks, tokenizer: Any, size: int, max_length: int, template: bool) -> dict:
    """{task: batches for `model(**batch)`}, rows in their order."""
    from plait.evaluation.generate import pad_token
    from plait.training.data import Collator, encode_all

    collate = Collator(pad_token(tokenizer), max_length=max_length)
    found = {}
    for task, questions in tasks.items():
        items = encode_all([q.example for q in questions], tokenizer, max_length, template).items
        found[task] = [collate(items[s : s + size]) for s in range(0, len(items), size)]
    return found
