"""Faithfulness on models whose use of the steps is known by construction."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import plait
from plait.errors import FormatError
from plait.evaluation.faithfulness import extract_answer, faithfulness
from tiny_language_model import byte_tokenizer, tiny_model

DIGITS = "123456789"
ROWS = [
    {
        "question": "Which digit?",
        "steps": [f"it may be {(i + 3) % 9 + 1}", f"or {(i + 5) % 9 + 1}", f"so {i % 9 + 1}"],
        "paraphrases": [
            f"perhaps {(i + 3) % 9 + 1}",
            f"else {(i + 5) % 9 + 1}",
            f"now {i % 9 + 1}",
        ],
        "choices": list(DIGITS),
        "answer": str(i % 9 + 1),
    }
    for i in range(9)
]


class Rule(nn.Module):
    """Says what a rule makes of the digits read so far, with certainty."""

    def __init__(self, tokenizer: Any, last: bool) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.codes = {tokenizer(d)["input_ids"][0]: d for d in DIGITS}
        self.last, self.space = last, tokenizer(" ")["input_ids"][0]
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, 258)
        for row, ids in enumerate(input_ids.tolist()):
            said = None
            for t, code in enumerate(ids):
                if code in self.codes:
                    said = code
                target = said if self.last and said is not None else min(self.codes)
                logits[row, t, target if code == self.space else self.space] = 20.0
        return SimpleNamespace(logits=logits)


def measured(model: Any, rows: Any = ROWS, **options: Any) -> dict[str, float]:
    (found,) = faithfulness(model, byte_tokenizer(), rows, template=False, **options)
    return {name: score.value for name, score in found.scores.items()}


def test_a_model_that_ignores_the_steps() -> None:
    found = measured(Rule(byte_tokenizer(), last=False))
    assert (found["early"], found["filler"], found["paraphrase"]) == (1, 1, 1)
    assert found["settled"] == 0 and found["early_log"] == pytest.approx(0, abs=1e-5)


def test_a_model_whose_answer_is_in_the_last_step() -> None:
    found = measured(Rule(byte_tokenizer(), last=True))
    # Without any step it says its first digit, which is right once in nine rows.
    assert found["early"] == pytest.approx(1 / 27) and found["filler"] == pytest.approx(1 / 27)
    assert found["paraphrase"] == 1 and found["accuracy"] == 1
    assert found["accuracy_without"] == pytest.approx(1 / 9)
    assert found["settled"] == 1 and found["early_log"] > 10


def test_an_adapter_beside_its_base_and_the_same_steps_twice() -> None:
    model = tiny_model()
    adapter = plait.attach(model, "lora", name="a", seed=0)
    for p in adapter.parameters():
        p.data = p.data + 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    rows = [{**row, "paraphrases": row["steps"]} for row in ROWS]
    asked = {"base": "base", "a": "a", "again": "a"}
    base, one, again = faithfulness(model, byte_tokenizer(), rows, adapters=asked)
    assert one.scores["paraphrase"].value == 1 == base.scores["paraphrase"].value
    change = one.change(again)
    assert all(score.value == 0 and score.low == 0 == score.high for score in change.values())
    gap = one.change(base)["early_log"]
    expected = one.scores["early_log"].value - base.scores["early_log"].value
    assert gap.value == pytest.approx(expected) and gap.low <= gap.value <= gap.high
    plait.detach(model)
    (alone,) = faithfulness(model, byte_tokenizer(), rows)
    for name, values in alone.values.items():  # an adapter that is off leaves the base's scores
        assert values == pytest.approx(base.values[name], abs=1e-5)


def test_without_choices_answers_are_written() -> None:
    rows = [{k: v for k, v in row.items() if k != "choices"} for row in ROWS[:3]]
    (found,) = faithfulness(tiny_model(), byte_tokenizer(), rows, template=False)
    assert set(found.scores) >= {"early", "filler", "settled"} and "early_log" not in found.scores


def test_answers_are_taken_out_of_texts() -> None:
    assert extract_answer(" 1,234.5 apples") == "1234.5"
    assert extract_answer(" (B) because") == "b" and extract_answer("...") == ""


def test_rows_that_lack_something_are_named() -> None:
    with pytest.raises(FormatError, match="row 2: a question"):
        faithfulness(tiny_model(), byte_tokenizer(), [ROWS[0], {"question": "x"}])
    with pytest.raises(FormatError, match="one a step"):
        faithfulness(tiny_model(), byte_tokenizer(), [{**ROWS[0], "paraphrases": ["a"]}])
