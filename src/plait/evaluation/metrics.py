"""The metrics: what a model says about questions, in one pass for each way of asking, and scores.

Three ways of asking (`written`, `chosen`, `read`) give raw answers, one list for every voice (see
`rows`); what they are worth is judged afterwards, as often as one likes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.errors import PlaitError
from plait.evaluation import calibration
from plait.evaluation.generate import Advance, greedy_answers
from plait.evaluation.intervals import bootstrap, wilson
from plait.evaluation.likelihood import Likelihood, best_choice, encode_choices, likelihoods
from plait.evaluation.question import Question
from plait.evaluation.results import Score
from plait.evaluation.rows import Voices, by_voice, repeated
from plait.evaluation.texts import POOLED, judge, pooled, same_text
from plait.training.data import encode

__all__ = ["Asking", "Pick", "Scorer", "chosen", "read", "same_text", "written"]

Scorer = Callable[[str, Mapping[str, Any]], float | bool]
"""`(prediction, row) -> True / False, or a number`: whether the text answers the row."""

RESAMPLED = 100
"""Draws of a bootstrap that scores a whole set anew each time."""


@dataclass(frozen=True)
class Asking:
    """What the metrics of one evaluation share."""

    model: Any
    tokenizer: Any
    batch_size: int
    max_new_tokens: int
    max_length: int
    template: bool


@dataclass(frozen=True)
class Pick:
    """The option taken, and how probable each is among them: softmax of log-likelihood a token."""

    option: int
    probabilities: tuple[float, ...]


# -- asking ---------------------------------------------------------------------------------------


def written(
    questions: Sequence[Question], asking: Asking, voices: Voices | None, advance: Advance
) -> list[list[str]]:
    """Greedy answers to every question, one list a voice; one list where `voices` is None."""
    prompts = [q.prompt(asking.tokenizer, asking.template) for q in questions]
    items, who = (prompts, None) if voices is None else repeated(prompts, voices)
    found = greedy_answers(
        asking.model,
        asking.tokenizer,
        items,
        max_new_tokens=asking.max_new_tokens,
        batch_size=asking.batch_size,
        special_tokens=not asking.template,
        voices=who,
        advance=advance,
    )
    return by_voice(found, 1 if voices is None else len(voices))


def chosen(
    questions: Sequence[Question], asking: Asking, voices: Voices | None, advance: Advance
) -> list[list[Pick]]:
    """The likeliest option of every question by likelihood per token, one list a voice."""
    if bare := next((q for q in questions if not q.choices), None):
        raise PlaitError(
            f"{bare.example.origin or 'a row'} has no choices; metric 'choice' needs them in all."
        )
    options = [
        encode_choices(q, asking.tokenizer, asking.max_length, asking.template) for q in questions
    ]
    flat = [item for group in options for item in group]
    picks = []
    for found in _likelihoods(flat, asking, voices, advance):
        rest = iter(found)
        picks.append([_pick([next(rest) for _ in group]) for group in options])
    return picks


def read(
    questions: Sequence[Question], asking: Asking, voices: Voices | None, advance: Advance
) -> list[list[Likelihood]]:
    """How likely each reference answer is, one list a voice."""
    items = [
        encode(q.example, asking.tokenizer, asking.max_length, asking.template) for q in questions
    ]
    return _likelihoods(items, asking, voices, advance)


def _likelihoods(
    items: Sequence[Any], asking: Asking, voices: Voices | None, advance: Advance
) -> list[list[Likelihood]]:
    items, who = (items, None) if voices is None else repeated(items, voices)
    found = likelihoods(
        asking.model,
        asking.tokenizer,
        items,
        batch_size=asking.batch_size,
        voices=who,
        advance=advance,
    )
    return by_voice(found, 1 if voices is None else len(voices))


def _pick(options: Sequence[Likelihood]) -> Pick:
    logits = -np.array([o.per_token for o in options])
    weights = np.exp(logits - logits.max())
    return Pick(best_choice(options), tuple((weights / weights.sum()).tolist()))


# -- judging --------------------------------------------------------------------------------------

Judged = tuple[dict[str, Score], dict[str, list[float]]]
"""Scores, and the numbers by example that they are made of."""


def text_scores(
    questions: Sequence[Question],
    predictions: Sequence[str],
    metrics: Sequence[str],
    scorers: Mapping[str, Scorer],
) -> Judged:
    """Of written answers: the metrics of `texts`, and the caller's own scorers."""
    scores: dict[str, Score] = {}
    values: dict[str, list[float]] = {}
    for name in metrics:
        one = judge(name)
        values[name] = [one(p, q.answer) for p, q in zip(predictions, questions, strict=True)]
        scores[name] = _mean(name, values[name])
        if name in POOLED:
            scores[name] = _pooled(name, predictions, [q.answer for q in questions])
    for name, scorer in scorers.items():
        pairs = zip(predictions, questions, strict=True)
        values[name] = [float(scorer(p, q.row)) for p, q in pairs]
        scores[name] = _mean(name, values[name])
    return scores, values


def choice_scores(
    questions: Sequence[Question], picks: Sequence[Pick], metrics: Sequence[str]
) -> Judged:
    """Of options taken: how often the right one, and where asked for macro F1 and calibration."""
    right = [float(p.option == q.correct) for p, q in zip(picks, questions, strict=True)]
    scores = {"choice": _mean("choice", right)}
    if "classification" in metrics:
        scores["macro_f1"] = _macro_f1(questions, picks)
    if "calibration" in metrics:
        confidence = [max(p.probabilities) for p in picks]
        for name in ("ece", "mce", "ace"):
            scores[name] = _calibration(name, confidence, right)
    return scores, {"choice": right, "confidence": [max(p.probabilities) for p in picks]}


def loss_scores(found: Sequence[Likelihood], max_length: int) -> Judged:
    """Mean cross-entropy (nats) over the answers' tokens, and its exponential, the perplexity."""
    kept = [f for f in found if f.tokens]
    if not kept:
        raise PlaitError(f"no answer fits into max_length={max_length}; raise it.")
    nll, tokens = [f.nll for f in kept], [f.tokens for f in kept]
    loss, (low, high) = sum(nll) / sum(tokens), bootstrap(nll, tokens)
    facts: dict[str, Any] = {
        "count": len(kept),
        "interval": "bootstrap",
        "tokens": sum(tokens),
        "higher_is_better": False,
    }
    scores = {
        "loss": Score("loss", loss, low, high, **facts),
        "perplexity": Score("perplexity", _exp(loss), _exp(low), _exp(high), **facts),
    }
    by_row = [f.per_token if f.tokens else math.nan for f in found]
    return scores, {"loss": by_row, "tokens": [float(f.tokens) for f in found]}


def _mean(name: str, values: Sequence[float]) -> Score:
    count, mean = len(values), sum(values) / len(values)
    if all(value in (0, 1) for value in values):
        return Score(name, mean, *wilson(int(sum(values)), count), count, "wilson")
    return Score(name, mean, *bootstrap(values), count, "bootstrap")


def _pooled(name: str, predictions: Sequence[str], answers: Sequence[str]) -> Score:
    value = pooled(name, predictions, answers)
    low, high = _resampled(
        len(answers),
        lambda index: pooled(name, [predictions[i] for i in index], [answers[i] for i in index]),
    )
    return Score(name, value, low, high, len(answers), "bootstrap")


def _macro_f1(questions: Sequence[Question], picks: Sequence[Pick]) -> Score:
    """The mean over classes of F1, for questions that all have the same choices."""
    classes = sorted(questions[0].choices)
    if odd := next((q for q in questions if sorted(q.choices) != classes), None):
        raise PlaitError(
            f"{odd.example.origin or 'a row'} has other choices than the first row; metric "
            "'classification' needs the same in all (use 'choice')."
        )
    mine = np.array([q.choices[p.option] for q, p in zip(questions, picks, strict=True)])
    right = np.array([q.answer for q in questions])

    def value(index: np.ndarray[Any, Any]) -> float:
        said, true = mine[index], right[index]
        both = [((said == c) & (true == c)).sum() for c in classes]
        either = [(said == c).sum() + (true == c).sum() for c in classes]
        f1 = [2 * b / e for b, e in zip(both, either, strict=True) if e]
        return float(np.mean(f1))

    count = len(questions)
    low, high = _resampled(count, value)
    return Score("macro_f1", value(np.arange(count)), low, high, count, "bootstrap")


def _calibration(name: str, confidence: Sequence[float], right: Sequence[float]) -> Score:
    said, true = np.array(confidence), np.array(right)
    measure = getattr(calibration, name)
    low, high = _resampled(len(true), lambda index: measure(said[index], true[index]))
    value = measure(said, true)
    return Score(name, value, low, high, len(true), "bootstrap", higher_is_better=False)


def _resampled(count: int, value: Callable[[Any], float]) -> tuple[float, float]:
    """The percentile bootstrap of a number that is no mean."""
    random = np.random.default_rng(0)
    found = [value(random.integers(0, count, count)) for _ in range(RESAMPLED)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
