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
from plait.evaluation import metrics as asked
from plait.evaluation.generate import Advance
from plait.evaluation.metrics import Asking, Scorer, choice_scores, loss_scores, text_scores
from plait.evaluation.progress import bar
from plait.evaluation.question import Question, read_questions
from plait.evaluation.results import Evaluation, Result, Score
from plait.evaluation.rows import Voices, can_share
from plait.evaluation.texts import TEXT_METRICS

METRICS = ("exact_match", "choice", "loss")
"""What a search can climb; `evaluate` knows more."""
KNOWN = (*TEXT_METRICS, "choice", "classification", "calibration", "loss")
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
    mixed: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Ask a causal language model questions and score its answers.

    Args:
        examples: a .jsonl path, several, or rows, in the forms that training reads; rows with
            `choices` too (see `plait.evaluation.question`).
        metrics: of written answers "exact_match" (equal but for white space), "f1", "rouge1",
            "rouge2", "rougeL", "bleu", "chrf" (see `plait.evaluation.texts`); of options "choice"
            (the likeliest per token is the right one), "classification" (that, and macro F1) and
            "calibration" (that, and ECE, MCE, ACE of its probability); and "loss" (and perplexity,
            on the answers' tokens).
        scorer: `(prediction, row) -> bool or number`, reported as "score" over the greedy answers.
        adapters: names, or {label: name or {name: weight}}, asked one after the other; "base" is
            the model without any. None asks it as it stands. What was active is active again after.
        batch_size, max_new_tokens, max_length: limits of generation, and of encoded examples.
        template: render rows with the tokenizer's chat template.
        limit: only the first so many examples.
        mixed: ask all adapters in one pass, their rows side by side in every batch. Mixes of
            adapters, and those that cannot serve single rows, are still asked one by one.
        progress: show a bar on stderr.

    Proportions carry Wilson's interval, losses and numbers a bootstrap over examples. Raises
    PlaitError for an unknown metric or adapter, FormatError for a row of no known form.
    """
    wanted = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in wanted:
        if name not in KNOWN:
            raise unknown("metric", name, KNOWN)
    if not wanted and scorer is None:
        raise PlaitError("there is nothing to measure; name a metric or give a scorer.")
    questions = read_questions(examples)[:limit]
    scorers = {} if scorer is None else {"score": scorer}
    asking = Asking(model, tokenizer, batch_size, max_new_tokens, max_length, template)
    chosen = choices_of(model, adapters)
    steps = _steps(questions, wanted, bool(scorers)) * len(chosen)
    found: dict[str, Result] = {}
    with kept(model), bar("evaluating", steps, progress) as advance:
        for labels, voices in _groups(model, chosen, mixed):
            active = chosen[labels[0]]
            if voices is None and active is not None:
                activate(model, active)
            for result in _ask(labels, voices, questions, asking, wanted, scorers, advance):
                found[result.label] = result
    settings = {
        "metrics": [*wanted, *scorers],
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
        "template": template,
        "mixed": mixed,
    }
    asked_rows = [{"question": q.asked, "answer": q.answer} for q in questions]
    return Evaluation([found[label] for label in chosen], len(questions), settings, asked_rows)


def _groups(
    model: Any, chosen: Mapping[str, Mapping[str, float] | None], mixed: bool
) -> list[tuple[list[str], Voices | None]]:
    """Labels that are asked together with their adapters' names, and the others one by one."""
    together: dict[str, str | None] = {}
    for label, weights in chosen.items() if mixed else ():
        single = weights is not None and list(weights.values()) in ([], [1.0])
        name = next(iter(weights or {}), None)
        if single and can_share(model, name):
            together[label] = name
    if len(together) < 2:
        together = {}
    groups: list[tuple[list[str], Voices | None]] = []
    groups += [([*together], [*together.values()])] if together else []
    return groups + [([label], None) for label in chosen if label not in together]


def _ask(
    labels: Sequence[str],
    voices: Voices | None,
    questions: Sequence[Question],
    asking: Asking,
    metrics: Sequence[str],
    scorers: Mapping[str, Scorer],
    advance: Advance,
) -> list[Result]:
    """One result a label; what a pass took is shared out evenly among them."""
    started = time.perf_counter()
    texts = [m for m in metrics if m in TEXT_METRICS]
    options = [m for m in metrics if m in ("choice", "classification", "calibration")]
    scores: list[dict[str, Score]] = [{} for _ in labels]
    values: list[dict[str, list[float]]] = [{} for _ in labels]
    predictions: list[list[str]] = [[] for _ in labels]

    def keep(judged: list[asked.Judged]) -> None:
        for i, (score, value) in enumerate(judged):
            scores[i] |= score
            values[i] |= value

    if texts or scorers:
        predictions = asked.written(questions, asking, voices, advance)
        keep([text_scores(questions, found, texts, scorers) for found in predictions])
    if options:
        picks = asked.chosen(questions, asking, voices, advance)
        keep([choice_scores(questions, found, options) for found in picks])
    if "loss" in metrics:
        reads = asked.read(questions, asking, voices, advance)
        keep([loss_scores(found, asking.max_length) for found in reads])
    seconds = (time.perf_counter() - started) / len(labels)
    active = [_active(asking.model)] if voices is None else [{v: 1.0} if v else {} for v in voices]
    rows = zip(labels, active, scores, predictions, values, strict=True)
    return [Result(name, on, score, seconds, said, each) for name, on, score, said, each in rows]


def choices_of(
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
    picks = {"choice", "classification", "calibration"} & set(metrics)
    options = sum(len(q.choices) for q in questions) if picks else 0
    writes = generates or any(m in TEXT_METRICS for m in metrics)
    return len(questions) * (writes + ("loss" in metrics)) + options


@contextlib.contextmanager
def kept(model: Any) -> Iterator[None]:
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
