"""`evaluate`: the same questions to one or several adapters, and their scores with intervals."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from plait.adapter import activate
from plait.adapter.state import find_state
from plait.adapter.weighting import is_number
from plait.errors import PlaitError, unknown
from plait.evaluation.generate import Advance
from plait.evaluation.metrics import Asking, Scorer, answer_scores, choice_score, loss_scores
from plait.evaluation.question import Question, read_questions
from plait.evaluation.results import Evaluation, Result, Score

METRICS = ("exact_match", "choice", "loss")
BASE = "base"

Choice = str | Mapping[str, float]


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Any,
    metrics: Sequence[str] | str = ("exact_match",),
    *,
    scorer: Scorer | None = None,
    adapters: Sequence[str] | Mapping[str, Choice] | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    max_length: int = 2048,
    template: bool = True,
    limit: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Ask a causal language model questions and score its answers.

    Args:
        examples: a .jsonl path, several, or rows, in the forms that training reads; rows with
            `choices` too (see `plait.evaluation.question`).
        metrics: of "exact_match" (greedy answer equals the reference but for white space), "choice"
            (the likeliest option per token is the right one), "loss" (and perplexity, on the
            answers' tokens).
        scorer: `(prediction, row) -> bool or number`, reported as "score" over the greedy answers.
        adapters: names, or {label: name or {name: weight}}, asked one after the other; "base" is
            the model without any. None asks it as it stands. What was active is active again after.
        batch_size, max_new_tokens, max_length: limits of generation, and of encoded examples.
        template: render rows with the tokenizer's chat template.
        limit: only the first so many examples.
        progress: show a bar on stderr.

    Proportions carry Wilson's interval, losses and numbers a bootstrap over examples. Raises
    PlaitError for an unknown metric or adapter, FormatError for a row of no known form.
    """
    wanted = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in wanted:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    if not wanted and scorer is None:
        raise PlaitError("there is nothing to measure; name a metric or give a scorer.")
    questions = read_questions(examples)[:limit]
    scorers: dict[str, Scorer | None] = {"exact_match": None} if "exact_match" in wanted else {}
    if scorer is not None:
        scorers["score"] = scorer
    asking = Asking(model, tokenizer, batch_size, max_new_tokens, max_length, template)
    chosen = _choices(model, adapters)
    steps = _steps(questions, wanted, bool(scorers)) * len(chosen)
    results = []
    with _kept(model), _bar(progress, steps) as advance:
        for label, active in chosen.items():
            if active is not None:
                activate(model, active)
            results.append(_ask(label, questions, asking, wanted, scorers, advance))
    settings = {
        "metrics": [*wanted, *(["score"] if scorer else [])],
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
        "template": template,
    }
    return Evaluation(results, len(questions), settings)


def _ask(
    label: str,
    questions: Sequence[Question],
    asking: Asking,
    metrics: Sequence[str],
    scorers: Mapping[str, Scorer | None],
    advance: Advance,
) -> Result:
    started = time.perf_counter()
    scores: dict[str, Score] = {}
    predictions: list[str] = []
    if scorers:
        scores, predictions = answer_scores(questions, asking, scorers, advance)
    if "choice" in metrics:
        scores["choice"] = choice_score(questions, asking, advance)
    if "loss" in metrics:
        scores |= loss_scores(questions, asking, advance)
    seconds = time.perf_counter() - started
    return Result(label, _active(asking.model), scores, seconds, predictions)


def _choices(
    model: Any, adapters: Sequence[str] | Mapping[str, Choice] | None
) -> dict[str, Mapping[str, float] | None]:
    """{label: {adapter: weight}}; None leaves the model as it stands."""
    if adapters is None:
        return {"+".join(_active(model)) or BASE: None}
    named = adapters if isinstance(adapters, Mapping) else {name: name for name in adapters}
    if not named:
        raise PlaitError("adapters is empty; name one, or 'base'.")
    state = find_state(model)
    known = dict(state.adapters) if state is not None else {}
    chosen: dict[str, Mapping[str, float] | None] = {}
    for label, choice in named.items():
        weights = {choice: 1.0} if isinstance(choice, str) else dict(choice)
        if weights == {BASE: 1.0} and BASE not in known:
            weights = {}
        for name in weights:
            if name not in known:
                raise unknown("adapter", name, [*known, BASE])
        chosen[label] = weights
    return chosen


def _active(model: Any) -> dict[str, Any]:
    state = find_state(model)
    return {} if state is None else {n: _number(w) for n, w in state.active.items()}


def _number(weight: Any) -> Any:
    """A weight, or weights by site (or by its rows or columns), as plain numbers."""
    if isinstance(weight, Mapping):
        return {path: _number(w) for path, w in weight.items()}
    return float(weight) if is_number(weight) else weight.tolist()


def _steps(questions: Sequence[Question], metrics: Sequence[str], generates: bool) -> int:
    options = sum(len(q.choices) for q in questions) if "choice" in metrics else 0
    return len(questions) * (generates + ("loss" in metrics)) + options


@contextlib.contextmanager
def _kept(model: Any) -> Iterator[None]:
    """The model in eval mode within, and after it in the mode and with the adapters of before."""
    state = find_state(model)
    before = None if state is None or state.fused is not None else dict(state.active)
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        if before is not None:
            activate(model, before)


@contextlib.contextmanager
def _bar(show: bool, total: int) -> Iterator[Advance]:
    if not show:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("evaluating", total=total)
        yield lambda done: bar.advance(task, done)
