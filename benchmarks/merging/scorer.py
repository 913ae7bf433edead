"""The scorer: a text's option is the one whose embedding is nearest to the text's.

    logits[row, option] = cos(encoder(text), base(option's text)) / 0.05

Options are embedded once, by the untouched base, and stay: as in zero-shot classifiers of pictures,
one side is adapted and the other is fixed, so that experts and merges answer in one space.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.merging.tasks import Task
from benchmarks.tasks.rows import Row
from torch import Tensor, nn

TEMPERATURE = 0.05
TOKENS = 40
"""Of a text at most; most rows have half as many."""


@dataclass
class Answer:
    """What the model returns: logits [rows, options], and the loss where labels were given."""

    logits: Tensor
    loss: Tensor | None = None


class Scorer(nn.Module):
    """`model(input_ids, attention_mask, options, labels)`; options [rows, n, width] end in 0s."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors [rows, width]: the mean over the tokens, as the base was trained."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].float()
        return nn.functional.normalize((states.float() * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        options: Tensor,
        labels: Tensor | None = None,
    ) -> Answer:
        texts = self.embed(input_ids, attention_mask)
        logits = torch.einsum("rd,rnd->rn", texts, options) / TEMPERATURE
        logits = logits.masked_fill(options.abs().sum(-1) == 0, -1e4)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return Answer(logits, loss)


class Words:
    """Turns rows into batches; the base embeds every option's text once."""

    def __init__(self, scorer: Scorer, tokenizer: Any) -> None:
        self._scorer, self._tokenizer = scorer, tokenizer
        self._known: dict[str, Tensor] = {}

    def learn(self, texts: Iterable[str]) -> None:
        """Embed these options; only before the scorer's weights have changed."""
        new = sorted({t for t in texts if t not in self._known}, key=len)
        with torch.no_grad():
            for at in range(0, len(new), 64):
                here = new[at : at + 64]
                self._known.update(zip(here, self._scorer.embed(**self._tokens(here)), strict=True))

    def encode(self, task: Task, rows: Sequence[Row]) -> list[dict[str, Tensor]]:
        """Every row as a batch of one without padding."""
        wordings = [[task.labels.get(c, c) for c in row["choices"]] for row in rows]
        self.learn(text for options in wordings for text in options)
        found = []
        for row, options in zip(rows, wordings, strict=True):
            batch = self._tokens([task.text(row["prompt"])])
            batch["options"] = torch.stack([self._known[text] for text in options])[None]
            batch["labels"] = torch.tensor([row["choices"].index(row["answer"])])
            found.append(batch)
        return found

    def _tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        found = self._tokenizer(
            list(texts), truncation=True, max_length=TOKENS, padding=True, return_tensors="pt"
        )
        return {key: found[key] for key in ("input_ids", "attention_mask")}


def joined(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of several rows, padded."""
    found = {}
    for key in rows[0]:
        width = max(row[key].shape[1] if row[key].dim() > 1 else 0 for row in rows)
        parts = [row[key] if row[key].dim() == 1 else _padded(row[key], width) for row in rows]
        found[key] = torch.cat(parts)
    return found


def _padded(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[1]
    ends = [0, 0] * (tensor.dim() - 2) + [0, missing]
    return nn.functional.pad(tensor, ends) if missing else tensor


def batches(rows: Sequence[dict[str, Tensor]], size: int = 32) -> list[dict[str, Tensor]]:
    """Batches of rows of similar length, shortest first."""
    ordered = sorted(rows, key=lambda row: row["input_ids"].shape[1])
    return [joined(ordered[at : at + size]) for at in range(0, len(ordered), size)]
