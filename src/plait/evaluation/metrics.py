"""The metrics: each turns questions and a model into scores, in one pass over the examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plait.errors import PlaitError
from plait.evaluation.generate import Advance, greedy_answers
from plait.evaluation.intervals import bootstrap, wilson
from plait.evaluation.likelihood import best_choice, encode_choices, likelihoods
from plait.evaluation.question import Question
from plait.evaluation.results import Score
from plait.training.data import encode

Scorer = Callable[[str, Mapping[str, Any]], float | bool]
"""`(prediction, row) -> True / False, or a number`: whether the text answers the row."""


@dataclass(frozen=True)
class Asking:
    """What the metrics of one evaluation share."""

    model: Any
    tokenizer: Any
    batch_size: int
    max_new_tokens: int
    max_length: int
    template: bool


def same_text(prediction: str, answer: str) -> bool:
    """Equal but for white space at the ends and its kind and amount between."""
    return prediction.split() == answer.split()


def answer_scores(
    questions: Sequence[Question],
    asking: Asking,
    scorers: Mapping[str, Scorer | None],
    advance: Advance,
) -> tuple[dict[str, Score], list[str]]:
    """Generates once and judges by every scorer (None: exact match); the predictions come along."""
    predictions = greedy_answers(
        asking.model,
        asking.tokenizer,
        [q.prompt(asking.tokenizer, asking.template) for q in questions],
        max_new_tokens=asking.max_new_tokens,
        batch_size=asking.batch_size,
        special_tokens=not asking.template,
        advance=advance,
    )
    pairs = list(zip(predictions, questions, strict=True))
    scores = {}
    for name, scorer in scorers.items():
        if scorer is None:
            scores[name] = _mean(name, [same_text(p, q.answer) for p, q in pairs])
        else:
            scores[name] = _mean(name, [scorer(p, q.row) for p, q in pairs])
    return scores, predictions


def _mean(name: str, values: Sequence[float | bool]) -> Score:
    count, mean = len(values), sum(map(float, values)) / len(values)
    if all(value in (0, 1) for value in values):
        return Score(name, mean, *wilson(int(sum(values)), count), count, "wilson")
    return Score(name, mean, *bootstrap([float(v) for v in values]), count, "bootstrap")


def choice_score(questions: Sequence[Question], asking: Asking, advance: Advance) -> Score:
    """How often the right option is the likeliest per token."""
    if bare := next((q for q in questions if not q.choices), None):
        raise PlaitError(
            f"{bare.example.origin or 'a row'} has no choices; metric 'choice' needs them in all."
        )
    encoded = [
        encode_choices(q, asking.tokenizer, asking.max_length, asking.template) for q in questions
    ]
    flat = [item for options in encoded for item in options]
    found = iter(
        likelihoods(
            asking.model, asking.tokenizer, flat, batch_size=asking.batch_size, advance=advance
        )
    )
    right = 0
    for question, options in zip(questions, encoded, strict=True):
        chosen = best_choice([next(found) for _ in options])
        right += chosen == question.correct
    count = len(questions)
    return Score("choice", right / count, *wilson(right, count), count, "wilson")


def loss_scores(
    questions: Sequence[Question], asking: Asking, advance: Advance
) -> dict[str, Score]:
    """Mean cross-entropy (nats) over the answers' tokens, and its exponential, the perplexity."""
    items = [
        encode(q.example, asking.tokenizer, asking.max_length, asking.template) for q in questions
    ]
    found = likelihoods(
        asking.model, asking.tokenizer, items, batch_size=asking.batch_size, advance=advance
    )
    kept = [f for f in found if f.tokens]
    if not kept:
        raise PlaitError(f"no answer fits into max_length={asking.max_length}; raise it.")
    nll, tokens = [f.nll for f in kept], [f.tokens for f in kept]
    loss, (low, high) = sum(nll) / sum(tokens), bootstrap(nll, tokens)
    facts: dict[str, Any] = {
        "count": len(kept),
        "interval": "bootstrap",
        "tokens": sum(tokens),
        "higher_is_better": False,
    }
    return {
        "loss": Score("loss", loss, low, high, **facts),
        "perplexity": Score("perplexity", _exp(loss), _exp(low), _exp(high), **facts),
    }


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
