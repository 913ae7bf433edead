"""Several adapters in one pass score as they do one by one; metrics agree with plain oracles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import plait
from plait.errors import PlaitError, UnknownNameError
from plait.evaluation import evaluate
from plait.evaluation.calibration import ece
from plait.evaluation.texts import judge, pooled, word_f1
from tiny_language_model import byte_tokenizer, tiny_model

ROWS = [{"prompt": "say " + "x" * (3 * i), "completion": f"word {i}"} for i in range(7)]
QUIZ = [
    {"prompt": f"{'more ' * (i % 3)}{i} + 1 =", "choices": ["yes", "no", "maybe"], "answer": i % 3}
    for i in range(9)
]
METHODS = {"a": "lora", "b": "lora", "c": "dora", "d": "ia3"}


@pytest.fixture(scope="module")
def model() -> Any:
    made = tiny_model()
    for seed, (name, method) in enumerate(METHODS.items()):
        adapter = plait.attach(made, method, name=name, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        for p in adapter.parameters():
            p.data = p.data + 0.2 * torch.randn(p.shape, generator=draw)
    return made


ASKED = {"base": "base", "a": "a", "both": {"a": 0.5, "b": 0.5}, "b": "b", "c": "c", "d": "d"}


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_one_mixed_pass_gives_the_scores_of_single_passes(model: Any, batch_size: int) -> None:
    settings: dict[str, Any] = {"adapters": ASKED, "max_new_tokens": 6, "batch_size": batch_size}
    for rows, metrics in ((ROWS, ["exact_match", "f1", "loss"]), (QUIZ, ["choice", "calibration"])):
        alone = evaluate(model, byte_tokenizer(), rows, metrics, **settings)
        mixed = evaluate(model, byte_tokenizer(), rows, metrics, mixed=True, **settings)
        assert [r.label for r in mixed.results] == list(ASKED)
        for one, other in zip(alone.results, mixed.results, strict=True):
            assert one.predictions == other.predictions and one.active == other.active
            for name, values in one.values.items():
                assert other.values[name] == pytest.approx(values, abs=1e-5)
            for name, score in one.scores.items():
                assert other.scores[name].value == pytest.approx(score.value, rel=1e-4)
        assert (
            len({r.values["loss" if rows is ROWS else "confidence"][0] for r in mixed.results}) > 3
        )


def test_a_mixed_pass_leaves_the_model_as_it_was(model: Any) -> None:
    plait.activate(model, {"b": 0.5})
    evaluate(model, byte_tokenizer(), ROWS, "loss", adapters=["a", "b"], mixed=True)
    (now,) = evaluate(model, byte_tokenizer(), ROWS, "loss").results
    assert now.active == {"b": 0.5}


def test_an_adapter_that_cannot_serve_single_rows_is_asked_alone() -> None:
    model = tiny_model()
    plait.attach(model, "lora", name="a")
    plait.attach(model, "lora", name="whole", train_modules=["lm_head"], targets=["q_proj"])
    found = evaluate(
        model, byte_tokenizer(), ROWS, "loss", adapters=["whole", "a", "base"], mixed=True
    )
    assert [r.label for r in found.results] == ["whole", "a", "base"]
    assert len({round(r.scores["loss"].value, 6) for r in found.results}) == 1  # all untrained


def test_words_in_common() -> None:
    assert word_f1("The cat sat.", "the CAT sat") == 1
    assert word_f1("a b c d", "a b e") == pytest.approx(2 * 2 / 7)
    assert word_f1("a a a", "a") == pytest.approx(2 * 1 / 4)
    assert word_f1("", "a") == 0 and word_f1("", "") == 1


def test_options_give_probabilities_and_calibration(model: Any) -> None:
    (found,) = evaluate(
        model, byte_tokenizer(), QUIZ, ["classification", "calibration"], adapters=["a"]
    ).results
    right, confidence = found.values["choice"], found.values["confidence"]
    assert set(found.scores) == {"choice", "macro_f1", "ece", "mce", "ace"}
    assert found.scores["choice"].value == pytest.approx(np.mean(right))
    assert found.scores["ece"].value == pytest.approx(ece(np.array(confidence), np.array(right)))
    assert all(1 / 3 <= c <= 1 for c in confidence)
    assert found.scores["ece"].low <= found.scores["ece"].value <= found.scores["ece"].high + 0.2
    assert not found.scores["ece"].higher_is_better


def test_macro_f1_is_scikit_learns(model: Any) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    from plait.evaluation.metrics import Pick, choice_scores
    from plait.evaluation.question import read_questions

    questions = read_questions(QUIZ)
    draw = np.random.default_rng(0)
    picks = [Pick(int(i), (1 / 3,) * 3) for i in draw.integers(0, 3, len(questions))]
    scores, _ = choice_scores(questions, picks, ["classification"])
    said = [q.choices[p.option] for q, p in zip(questions, picks, strict=True)]
    expected = sklearn.f1_score([q.answer for q in questions], said, average="macro")
    assert scores["macro_f1"].value == pytest.approx(expected)


def test_classes_must_be_the_same_in_all_rows(model: Any) -> None:
    rows = [*QUIZ, {"prompt": "x", "choices": ["1", "2"], "answer": 0}]
    with pytest.raises(PlaitError, match="row 10 has other choices than the first"):
        evaluate(model, byte_tokenizer(), rows, "classification")
    with pytest.raises(UnknownNameError, match="did you mean 'rougeL'"):
        evaluate(model, byte_tokenizer(), rows, "rougel")


TEXTS = ["the cat sat on the mat", "a dog", "it is what it is, they say"]
SAID = ["the cat is on the mat", "a small dog ran", "what is it"]


@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_packages(metric: str) -> None:
    package = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = package.RougeScorer([metric])
    for said, text in zip(SAID, TEXTS, strict=True):
        assert judge(metric)(said, text) == scorer.score(text, said)[metric].fmeasure


def test_rouge_l_by_hand() -> None:
    pytest.importorskip("rouge_score")
    # "the cat on the mat" is common: 5 of 6 words on both sides.
    assert judge("rougeL")(SAID[0], TEXTS[0]) == pytest.approx(5 / 6)


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_bleu_of_a_set_is_sacrebleus(metric: str, model: Any) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    corpus = getattr(sacrebleu, f"corpus_{metric}")
    assert pooled(metric, SAID, TEXTS) == pytest.approx(corpus(SAID, [TEXTS]).score / 100)
    (found,) = evaluate(model, byte_tokenizer(), ROWS, metric, max_new_tokens=8).results
    expected = corpus(found.predictions, [[r["completion"] for r in ROWS]]).score / 100
    assert found.scores[metric].value == pytest.approx(expected)
    assert not math.isnan(found.scores[metric].low)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from plait.evaluation import texts

    texts._rouge.cache_clear()
    texts._sacrebleu.cache_clear()
    for package in ("rouge_score", "rouge_score.rouge_scorer", "sacrebleu"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PlaitError, match=r"needs rouge-score; run `pip install 'plait\[eval\]'`"):
        judge("rouge2")
    with pytest.raises(PlaitError, match="needs sacrebleu"):
        judge("bleu")
