"""How likely the model finds given answers: loss on the labelled tokens, choice among options."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.evaluation.generate import Advance, batches_by_length, pad_left, pad_token
from plait.evaluation.question import Question
from plait.evaluation.rows import Voices, answering, grouped
from plait.training.data import IGNORE, Encoded, encode


@dataclass(frozen=True)
class Likelihood:
    """The negative log-likelihood (nats) of a text's labelled tokens, and how many they are."""

    nll: float
    tokens: int

    @property
    def per_token(self) -> float:
        return self.nll / self.tokens if self.tokens else 0.0


def likelihoods(
    model: Any,
    tokenizer: Any,
    items: Sequence[Encoded],
    *,
    batch_size: int = 16,
    voices: Voices | None = None,
    advance: Advance = lambda done: None,
) -> list[Likelihood]:
    """Of each item's labelled tokens given what stands before them.

    `voices` names the adapter that reads each item (None: the base), all in one pass.

    Rows are padded on the left, so that the answers line up on the right: where the model can, only
    their logits are computed (the vocabulary is what costs memory here).
    """
    found = [Likelihood(0.0, 0)] * len(items)
    for batch in batches_by_length([len(item) for item in items], batch_size):
        chosen = grouped(batch, voices)
        rows = [items[i] for i in chosen]
        with answering(model, None if voices is None else [voices[i] for i in chosen]):
            nll = _batch_nll(model, rows, pad_token(tokenizer))
        for i, value in zip(chosen, nll, strict=True):
            found[i] = Likelihood(value, items[i].trained)
        advance(len(chosen))
    return found


@torch.inference_mode()
def _batch_nll(model: Any, rows: Sequence[Encoded], pad: int) -> list[float]:
    ids, mask = pad_left([row.input_ids for row in rows], pad)
    labels, _ = pad_left([row.labels for row in rows], IGNORE)
    labels[:, 0] = IGNORE  # nothing stands before the first token
    labelled = (labels != IGNORE).any(0).nonzero()
    if len(labelled) == 0:
        return [0.0] * len(rows)
    keep = ids.shape[1] - int(labelled[0]) + 1  # the logits at t - 1 are for the token at t
    # A row's own first token can only come unlabelled here if padding stands before it.
    labels[:, 1:][(mask[:, :-1] == 0)] = IGNORE
    logits = _logits(model, ids.to(model.device), mask.to(model.device), keep)
    targets = labels[:, 1 - keep :].to(model.device)
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="none",
    )
    return losses.view(targets.shape).double().sum(1).tolist()


def _logits(model: Any, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
    """The logits [batch, keep, vocabulary] of the last `keep` places."""
    known = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {}
    if "position_ids" in known:  # absolute positions must not count the padding
        extra["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    if "logits_to_keep" in known:
        extra["logits_to_keep"] = keep
    return model(input_ids=ids, attention_mask=mask, **extra).logits[:, -keep:]


def encode_choices(
    question: Question, tokenizer: Any, max_length: int, template: bool
) -> list[Encoded]:
    """Each option as the answer. The end of the turn counts where a template writes one (without it
    "5" would beat "50" for free); plain text has no such habit, so there only the option counts."""
    encoded = []
    for choice in question.choices:
        item = encode(question.answered(choice), tokenizer, max_length, template, turns="last")
        if not template and item.input_ids[-1] == tokenizer.eos_token_id:
            item = Encoded(item.input_ids, [*item.labels[:-1], IGNORE], item.truncated)
        encoded.append(item)
    return encoded


def best_choice(options: Sequence[Likelihood], normalise: bool = True) -> int:
    """The option that is likeliest, per token (`normalise`) or as a whole."""
    scores = [o.per_token if normalise else o.nll for o in options]
    return min(range(len(scores)), key=scores.__getitem__)
