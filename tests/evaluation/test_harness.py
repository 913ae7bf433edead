"""lm-evaluation-harness on models with adapters: a task of its own form, from a local file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import plait
from plait.adapter.state import find_state
from plait.errors import PlaitError, UnknownNameError
from plait.evaluation.harness import harness_model
from plait.evaluation.likelihood import likelihoods
from plait.training.data import IGNORE, Encoded
from tiny_language_model import byte_tokenizer, tiny_model

QUIZ = [
    {"question": f"{i} plus {i % 3}?", "options": ["one", "two", "more"], "right": i % 3}
    for i in range(8)
]


@pytest.fixture(scope="module")
def model() -> Any:
    made = tiny_model()
    for seed, name in enumerate("ab"):
        adapter = plait.attach(made, "lora", name=name, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        for p in adapter.parameters():
            p.data = p.data + 0.3 * torch.randn(p.shape, generator=draw)
    plait.activate(made, {"b": 1.0})
    return made


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from plait.evaluation import harness

    harness._class.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(PlaitError, match=r"pip install 'plait\[lm-eval\]'"):
        harness_model(tiny_model(), byte_tokenizer())


def test_an_unknown_adapter_is_named(model: Any) -> None:
    with pytest.raises(UnknownNameError, match="unknown adapter 'c'"):
        harness_model(model, byte_tokenizer(), "c")


def task(folder: Path) -> dict[str, Any]:
    """Multiple choice, as the harness's own task files write it."""
    file = folder / "quiz.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUIZ))
    return {
        "task": "quiz",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def test_a_local_task_scores_every_adapter(model: Any, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    tokenizer = byte_tokenizer()
    for adapter in ("a", "base", {"a": 0.5, "b": 0.5}):
        lm = harness_model(model, tokenizer, adapter, batch_size=4)
        found = lm_eval.simple_evaluate(lm, tasks=[task(tmp_path)], bootstrap_iters=0)
        assert find_state(model).active == {"b": 1.0}  # as before
        names = {adapter: 1.0} if isinstance(adapter, str) else adapter
        plait.activate(model, {} if adapter == "base" else names)
        expected = [oracle(model, tokenizer, row) == row["right"] for row in QUIZ]
        plait.activate(model, {"b": 1.0})
        assert found["results"]["quiz"]["acc,none"] == pytest.approx(sum(expected) / len(QUIZ))


def oracle(model: Any, tokenizer: Any, row: dict[str, Any]) -> int:
    """The likeliest option as a whole, by Plait's own likelihoods."""
    items = []
    for option in row["options"]:
        before = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
        after = tokenizer(" " + option, add_special_tokens=False)["input_ids"]
        items.append(Encoded([*before, *after], [*[IGNORE] * len(before), *after], False))
    found = [f.nll for f in likelihoods(model, tokenizer, items)]
    return found.index(min(found))
