"""Forgetting against numpy, and the report's files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import plait
from plait.evaluation import evaluate
from plait.evaluation.eval_page import write_evaluation
from plait.evaluation.faithfulness import faithfulness
from plait.evaluation.forgetting import forgetting
from plait.evaluation.results import Evaluation, Result
from tiny_language_model import byte_tokenizer, tiny_model

QUIZ = [{"prompt": f"{i} + 1 =", "choices": ["yes", "no"], "answer": i % 2} for i in range(8)]
STEPS = [{"question": "q?", "steps": ["one", "two"], "choices": ["yes", "no"], "answer": 0}]


def result(label: str, metric: str, values: list[float]) -> Result:
    from plait.evaluation.metrics import _mean

    return Result(label, {}, {metric: _mean(metric, values)}, 0.0, [], {metric: values})


def test_a_paired_difference_is_told_from_chance() -> None:
    draw = np.random.default_rng(0)
    base = draw.uniform(0, 1, 60)
    worse, same = base - 0.1 + draw.normal(0, 0.02, 60), base + draw.normal(0, 0.02, 60)
    found = {
        metric: Evaluation(
            [result("base", metric, base.tolist())]
            + [result(n, metric, v.tolist()) for n, v in (("worse", worse), ("same", same))],
            60,
            {},
        )
        for metric in ("f1", "loss")
    }
    changes = forgetting(found)
    assert [(c.task, c.label, c.worse) for c in changes] == [
        ("f1", "worse", True),
        ("f1", "same", False),
        ("loss", "worse", False),  # a lower loss is no loss
        ("loss", "same", False),
    ]
    assert changes[0].score.value == pytest.approx((worse - base).mean())
    assert changes[0].before == pytest.approx(base.mean())
    # Paired: far narrower than the spread of either.
    assert changes[0].score.high - changes[0].score.low < 0.02


def test_the_report_holds_everything(tmp_path: Path) -> None:
    model = tiny_model()
    adapter = plait.attach(model, "lora", name="<a>".strip("<>"), seed=0)
    for p in adapter.parameters():
        p.data = p.data + 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    asked = {"base": "base", "<b>mine</b>": "a"}
    found = evaluate(model, byte_tokenizer(), QUIZ, "calibration", adapters=asked, mixed=True)
    other = {"quiz 2": evaluate(model, byte_tokenizer(), QUIZ[:4], "loss", adapters=asked)}
    thought = faithfulness(model, byte_tokenizer(), STEPS, adapters=asked)
    written = write_evaluation(
        tmp_path, found, others=other, changes=forgetting(other), reasoning=thought
    )
    names = sorted(p.name for p in written)
    assert names == [
        "reliability-1-base.png",
        "reliability-2-b-mine-b.png",
        "report.html",
        "report.json",
    ]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for heading in ("Scores", "Calibration", "Forgetting", "Scores on quiz 2", "Chain of thought"):
        assert f"<h2>{heading}</h2>" in html
    assert "<b>" not in html and html.count("data:image/png;base64,") == 2
    facts = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert len(facts["results"]) == 2 and facts["forgetting"][0]["task"] == "quiz 2"
    assert facts["faithfulness"][1]["label"] == "<b>mine</b>"


def test_a_change_of_loss_is_that_of_the_scores(tmp_path: Path) -> None:
    model = tiny_model()
    adapter = plait.attach(model, "lora", name="a", seed=0)
    for p in adapter.parameters():
        p.data = p.data + 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    rows = [{"prompt": f"{i}?", "completion": " yes" * (1 + 3 * (i % 2))} for i in range(6)]
    asked = {"base": "base", "mine": "a"}
    found = evaluate(model, byte_tokenizer(), rows, "loss", adapters=asked, template=False)
    (change,) = forgetting({"task": found})
    old, new = (found[label].scores["loss"].value for label in asked)
    assert (change.before, change.after) == pytest.approx((old, new))
    assert change.score.low <= change.score.value == pytest.approx(new - old)


def test_answers_stand_beside_what_was_asked_and_wanted(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} plus?", "completion": f"w{i}" + "x" * 300} for i in range(3)]
    found = evaluate(tiny_model(), byte_tokenizer(), rows, max_new_tokens=4, template=False)
    write_evaluation(tmp_path, found)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<th>question</th><th>wanted</th><th>base</th>" in html
    assert "<td>2 plus?</td><td>w2xxx" in html and "x…</td>" in html
    assert "x" * 250 not in html
    facts = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert facts["questions"][0] == {"question": "0 plus?", "answer": rows[0]["completion"]}


def test_no_best_where_all_are_equal(tmp_path: Path) -> None:
    both = [result(n, "f1", [0.0, 1.0]) for n in ("base", "mine")]
    write_evaluation(tmp_path, Evaluation(both, 2, {}))
    assert 'class="good' not in (tmp_path / "report.html").read_text(encoding="utf-8")
