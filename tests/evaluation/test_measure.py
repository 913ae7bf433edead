"""A measure's numbers are those of `evaluate`, by example, and follow the model."""

from __future__ import annotations

import pytest
import torch

import plait
from plait.errors import PlaitError, UnknownNameError
from plait.evaluation import evaluate, read_questions
from plait.evaluation.measure import Measure
from tiny_language_model import byte_tokenizer, tiny_model

ROWS = [{"prompt": f"say {i}", "completion": f"word {i}"} for i in range(5)]
QUIZ = [
    {"prompt": f"{i} + 1 =", "choices": [str(i + 1), str(i + 2), "none"], "answer": 0}
    for i in range(6)
]


@pytest.fixture(scope="module")
def model():
    made = tiny_model()
    adapter = plait.attach(made, "lora", name="a", rank=2, targets="all-linear")
    draw = torch.Generator().manual_seed(3)
    for p in adapter.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=draw)
    return made


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0])
def test_values_are_those_of_an_evaluation(model, weight: float) -> None:
    tokenizer = byte_tokenizer()
    plait.activate(model, {"a": weight})
    found = evaluate(model, tokenizer, ROWS, ["loss", "exact_match"]).results[0].scores
    questions = read_questions(ROWS)
    assert Measure(tokenizer, questions).value(model) == pytest.approx(-found["loss"].value)
    exact = Measure(tokenizer, questions, "exact_match", max_new_tokens=8)
    assert exact.value(model) == found["exact_match"].value
    choice = evaluate(model, tokenizer, QUIZ, "choice").results[0].scores["choice"]
    assert Measure(tokenizer, read_questions(QUIZ), "choice").value(model) == choice.value


def test_scores_of_a_loss_are_the_answers_probabilities(model) -> None:
    plait.activate(model, {"a": 1.0})
    tokenizer, scores = byte_tokenizer(), []
    for row in ROWS:
        (result,) = evaluate(model, tokenizer, [row], "loss").results
        scores.append(1 / result.scores["perplexity"].value)
    found = Measure(tokenizer, read_questions(ROWS), batch_size=2).scores(model)
    assert found.tolist() == pytest.approx(scores, rel=1e-4)
    assert found.min() > 0 and found.max() < 1


def test_a_scorer_sees_predictions_and_rows(model) -> None:
    seen = []

    def half(prediction: str, row) -> float:
        seen.append((prediction, row["prompt"]))
        return 0.5

    measure = Measure(byte_tokenizer(), read_questions(ROWS), scorer=half, max_new_tokens=2)
    assert measure.scores(model).tolist() == [0.5] * 5 and len(seen) == 5


def test_what_cannot_be_measured_is_said_before_the_model_runs() -> None:
    tokenizer, questions = byte_tokenizer(), read_questions(ROWS)
    with pytest.raises(UnknownNameError, match="unknown metric"):
        Measure(tokenizer, questions, "accuracy")
    with pytest.raises(PlaitError, match="row 1 has no choices"):
        Measure(tokenizer, questions, "choice")
    with pytest.raises(PlaitError, match="no answer within max_length=4"):
        Measure(tokenizer, questions, max_length=4)


def test_an_evaluation_tells_weights_by_row(model) -> None:
    path = "model.layers.0.mlp.up_proj"
    plait.activate(model, {"a": {path: torch.full((48, 1), 0.5)}})
    (result,) = evaluate(model, byte_tokenizer(), ROWS, "loss").results
    assert result.active["a"][path] == [[0.5]] * 48
    evaluate(model, byte_tokenizer(), ROWS, "loss", adapters=["base"])
