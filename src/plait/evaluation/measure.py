"""`Measure`: questions made ready once, to be asked again and again of a model that changes.

For searches, which need numbers by example and no intervals. `evaluate` is for results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlaitError, unknown
from plait.evaluation.driver import METRICS
from plait.evaluation.generate import greedy_answers
from plait.evaluation.likelihood import Likelihood, best_choice, encode_choices, likelihoods
from plait.evaluation.metrics import Scorer, same_text
from plait.evaluation.question import Question
from plait.training.data import Encoded, encode


class Measure:
    """One metric of one list of questions.

    Args:
        metric: "loss", "exact_match" or "choice", as in `plait.evaluation.evaluate`.
        scorer: `(prediction, row) -> bool or number in [0, 1]`, in place of a metric.
        batch_size, max_new_tokens, max_length, template: as in `evaluate`.

    PlaitError for an unknown metric, questions without what it needs, and answers that do not fit
    into `max_length`.
    """

    def __init__(
        self,
        tokenizer: Any,
        questions: Sequence[Question],
        metric: str = "loss",
        *,
        scorer: Scorer | None = None,
        batch_size: int = 16,
        max_new_tokens: int = 64,
        max_length: int = 2048,
        template: bool = True,
    ) -> None:
        if scorer is None and metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        self.tokenizer, self.questions, self.scorer = tokenizer, list(questions), scorer
        self.metric = metric if scorer is None else "score"
        self.batch_size, self.max_new_tokens, self.template = batch_size, max_new_tokens, template
        self.prompts: list[str] = []
        self.items: list[Encoded] = []
        if self.metric == "loss":
            examples = [q.example for q in questions]
            self.items = [encode(e, tokenizer, max_length, template) for e in examples]
            if bare := [q for q, i in zip(questions, self.items, strict=True) if not i.trained]:
                where = bare[0].example.origin or "a row"
                raise PlaitError(f"{where}: no answer within max_length={max_length}; raise it.")
        elif self.metric == "choice":
            if bare := [q for q in questions if not q.choices]:
                raise PlaitError(f"{bare[0].example.origin or 'a row'} has no choices.")
            options = [encode_choices(q, tokenizer, max_length, template) for q in questions]
            self.items = [item for option in options for item in option]
        else:
            self.prompts = [q.prompt(tokenizer, template) for q in questions]

    def value(self, model: Any) -> float:
        """The metric, the greater the better: a mean score, or minus the loss in nats a token."""
        if self.metric == "loss":
            found = self._likelihoods(model)
            return -sum(f.nll for f in found) / sum(f.tokens for f in found)
        return float(self.scores(model).mean())

    def scores(self, model: Any) -> Tensor:
        """[n] in [0, 1]: whether each is right; of "loss" the answer's probability, by its tokens'
        geometric mean."""
        if self.metric == "loss":
            per_token = [f.per_token for f in self._likelihoods(model)]
            return torch.tensor(per_token, dtype=torch.float64).neg().exp()
        found = self._chosen(model) if self.metric == "choice" else self._judged(model)
        return torch.tensor(found, dtype=torch.float64)

    def _likelihoods(self, model: Any) -> list[Likelihood]:
        return likelihoods(model, self.tokenizer, self.items, batch_size=self.batch_size)

    def _chosen(self, model: Any) -> list[float]:
        found = iter(self._likelihoods(model))
        picked = [best_choice([next(found) for _ in q.choices]) for q in self.questions]
        return [float(p == q.correct) for p, q in zip(picked, self.questions, strict=True)]

    def _judged(self, model: Any) -> list[float]:
        answers = greedy_answers(
            model,
            self.tokenizer,
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            special_tokens=not self.template,
        )
        pairs = zip(answers, self.questions, strict=True)
        if self.scorer is None:
            return [float(same_text(text, q.answer)) for text, q in pairs]
        return [float(self.scorer(text, q.row)) for text, q in pairs]
