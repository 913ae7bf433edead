"""A recipe as a task: a causal language model on rows of text.

Training rows are the recipe's `data` but for a few that are held out to choose learning rates by;
what is reported is measured on `eval_data` or, without any, on a fifth of the rows held out too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from plait.errors import PlaitError
from plait.evaluation.generate import greedy_answers
from plait.evaluation.likelihood import best_choice, encode_choices, likelihoods
from plait.evaluation.metrics import Scorer, same_text
from plait.evaluation.question import Question, read_questions
from plait.study.task import Task
from plait.training.recipe import Recipe

METRICS = ("loss", "exact_match", "choice")


@dataclass
class _Data:
    """What was read and encoded, once a process."""

    tokenizer: Any
    train: list[Any]
    """Rows of the batches (packed, where the recipe packs)."""
    validation: list[Any]
    test: list[Question]
    collate: Any


class RecipeTask(Task):
    """Args:
    recipe: its method and options say whose count of parameters is the budget.
    metric: "loss" (nats a token of each answer, less is better), "exact_match" of greedy answers,
        or "choice" for rows with choices.
    scorer: `(prediction, row) -> bool or number` for the greedy answers instead; must pickle.
    test_rows, validation_rows: at most so many.
    """

    def __init__(
        self,
        recipe: Recipe,
        metric: str = "loss",
        scorer: Scorer | None = None,
        test_rows: int = 200,
        validation_rows: int = 64,
        max_new_tokens: int = 64,
    ) -> None:
        from plait.errors import unknown

        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        if recipe.data is None:
            raise PlaitError("recipe: data is missing; name a JSON-lines file.")
        if test_rows < 2 or validation_rows < 2:
            raise PlaitError("compare: at least 2 rows to test and 2 to validate on.")
        self.recipe, self.scorer = recipe, scorer
        self.metric = "score" if scorer is not None else metric
        self.higher_is_better = self.metric != "loss"
        self.name, self.title = recipe.base, f"{recipe.base} on {recipe.data}"
        self.test_rows, self.validation_rows = test_rows, validation_rows
        self.max_new_tokens = max_new_tokens
        self._data: _Data | None = None
        self._loaded: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None, "_loaded": None}

    # -- the base and the data ----------------------------------------------------------------

    def load(self) -> nn.Module:
        from plait.training.bases import load_base

        if self._loaded is not None:  # opened for its tokenizer, and not yet handed out
            model, self._loaded = self._loaded, None
            return model
        model, tokenizer = load_base(self.recipe.base, self.recipe.dtype)
        if self._data is None:
            self._data = self._read(model, tokenizer)
        return model

    def data(self) -> _Data:
        if self._data is None:
            self._loaded = self.load()
        assert self._data is not None
        return self._data

    def _read(self, model: Any, tokenizer: Any) -> _Data:
        from plait.training.data import Collator, encode_all, pack, read_examples

        recipe, examples = self.recipe, list(read_examples(self.recipe.data))
        random.Random("held out").shuffle(examples)
        if recipe.eval_data is None:
            count = min(self.test_rows, max(2, len(examples) // 5))
            test, examples = read_questions(examples[:count]), examples[count:]
        else:
            test = read_questions(recipe.eval_data)[: self.test_rows]
        few = min(self.validation_rows, max(2, len(examples) // 8))
        if len(examples) < few + 1:
            raise PlaitError(f"compare: {recipe.data} has too few rows to hold some out.")

        def encode(rows: Sequence[Any]) -> list[Any]:
            how = (recipe.max_length, recipe.template, recipe.turns)
            return list(encode_all(rows, tokenizer, *how).items)

        train = encode(examples[few:])
        return _Data(
            tokenizer,
            list(pack(train, recipe.max_length)) if recipe.packing else train,
            encode(examples[:few]),
            test,
            Collator(
                tokenizer.pad_token_id,
                max_length=recipe.max_length,
                attention=getattr(model.config, "_attn_implementation", None) or "sdpa",
                dtype=next(p.dtype for p in model.parameters() if p.is_floating_point()),
            ),
        )

    def facts(self) -> dict[str, Any]:
        data = self.data()
        return {
            "training rows": len(data.train),
            "training tokens": sum(len(r) for r in data.train),
            "validation rows": len(data.validation),
            "test rows": len(data.test),
        }

    def steps(self) -> int:
        return self.recipe.total_steps(len(self.data().train))

    # -- training -----------------------------------------------------------------------------

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """As `plait train` would take them, epoch after epoch. Accumulated batches come as one:
        the same step, in the memory of the larger batch."""
        from plait.training.data import LengthGroupedSampler

        data, recipe = self.data(), self.recipe
        sampler = LengthGroupedSampler([len(r) for r in data.train], recipe.batch_size, seed)
        size, epoch = recipe.batch_size * recipe.gradient_accumulation, 0
        while True:
            sampler.set_epoch(epoch)
            order = list(sampler)
            for start in range(0, len(order), size):
                yield data.collate([data.train[i] for i in order[start : start + size]])
            epoch += 1

    def loss(self, model: Any, batch: Any) -> Tensor:
        from plait.training.head import labelled_positions

        on_device = {k: v.to(model.device) for k, v in batch.items()}
        return model(**labelled_positions(model, on_device)).loss

    # -- held-out data ------------------------------------------------------------------------

    def validate(self, model: Any) -> float:
        """Mean cross-entropy of the answers' tokens."""
        data = self.data()
        found = likelihoods(model, data.tokenizer, data.validation)
        return sum(f.nll for f in found) / max(1, sum(f.tokens for f in found))

    def validation_batches(self) -> Sequence[Any] | None:
        data, size = self.data(), self.recipe.batch_size
        rows = data.validation
        return [data.collate(rows[i : i + size]) for i in range(0, len(rows), size)]

    def scores(self, model: Any) -> Iterator[float]:
        test = self.data().test
        for start in range(0, len(test), 16):
            yield from self._judged(model, test[start : start + 16])

    def _judged(self, model: Any, part: Sequence[Question]) -> list[float]:
        tokenizer, recipe = self.data().tokenizer, self.recipe
        if self.metric == "loss":
            from plait.training.data import encode

            items = [encode(q.example, tokenizer, recipe.max_length, recipe.template) for q in part]
            return [found.per_token for found in likelihoods(model, tokenizer, items)]
        if self.metric == "choice":
            return [self._chosen(model, tokenizer, q) for q in part]
        answers = greedy_answers(
            model,
            tokenizer,
            [q.prompt(tokenizer, recipe.template) for q in part],
            max_new_tokens=self.max_new_tokens,
            special_tokens=not recipe.template,
        )
        judge = self.scorer or _exact
        return [
            float(judge(a, q.row if self.scorer else {"answer": q.answer}))
            for a, q in zip(answers, part, strict=True)
        ]

    def _chosen(self, model: Any, tokenizer: Any, question: Question) -> float:
        if not question.choices:
            raise PlaitError("metric 'choice' needs rows with choices.")
        options = encode_choices(question, tokenizer, self.recipe.max_length, self.recipe.template)
        return float(best_choice(likelihoods(model, tokenizer, options)) == question.correct)


def _exact(prediction: str, row: Mapping[str, Any]) -> bool:
    return same_text(prediction, row["answer"])
