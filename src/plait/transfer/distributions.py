"""Teachers' distributions over next tokens: taken, carried to another vocabulary, made one.

    teacher_rows ──► carried (alignment, vocabulary) ──► fuse_distributions: MinCE or AvgCE

A row stands for one label: the leading token ids and their shares. A teacher's row is carried to
the target's label that its own label alone stands for, in the text that both read; where the two
tokenizers cut the text differently there is no row, and the label counts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from plait.adapter.state import find_state
from plait.errors import PlaitError, unknown
from plait.statistics.frozen import frozen
from plait.training.data import IGNORE, Collator, Encoded
from plait.transfer.vocabulary import VocabularyMap

Fusing = Literal["min-ce", "avg-ce"]


@dataclass(frozen=True)
class Distributions:
    """Rows for the n labels of one example (all but its first, which nothing predicts)."""

    ids: Tensor
    """[n, k], int64."""
    shares: Tensor
    """[n, k], float32, which add up to 1, or to 0 where nothing is known."""
    mass: Tensor
    """[n]: the probability that the shares stood for before they were made to add up to 1."""

    @property
    def known(self) -> Tensor:
        """Which labels have a row, [n]."""
        return self.shares.sum(-1) > 0

    def cross_entropy(self, labels: Tensor, vocabulary: int) -> Tensor:
        """-log of each label's probability [n], in nats; what the row has lost counts as spread
        evenly over the vocabulary, and labels without a row are NaN."""
        own = (self.shares * (self.ids == labels[:, None])).sum(-1) * self.mass
        spread = (1 - self.mass).clamp_min(1e-6) / vocabulary
        return torch.where(self.known, -(own + spread).log(), torch.nan)


def predicted(item: Encoded) -> list[int]:
    """The places of an example's labels that something predicts."""
    return [at for at, label in enumerate(item.labels) if label != IGNORE and at > 0]


@torch.no_grad()
def teacher_rows(
    model: nn.Module,
    items: Sequence[Encoded],
    *,
    top_k: int = 10,
    temperature: float = 1.0,
    batch_size: int = 8,
) -> list[Distributions]:
    """The teacher's `top_k` leading tokens for every label of its own encoded examples.

    The adapters that are active on it take part. Shares add up to 1 after the rest is cut off.
    """
    if top_k < 1 or temperature <= 0:
        raise PlaitError("teacher_rows: top_k from 1 up, temperature above 0.")
    collator, found = Collator(pad_token_id=0, multiple=1), []
    state = find_state(model)
    with frozen(model, () if state is None else dict(state.active)) as device:
        for start in range(0, len(items), batch_size):
            group = items[start : start + batch_size]
            batch = {name: value.to(device) for name, value in collator(group).items()}
            logits = model(**{n: v for n, v in batch.items() if n != "labels"}).logits
            for row, item in enumerate(group):
                places = torch.tensor(predicted(item), dtype=torch.long, device=device) - 1
                found.append(_leading(logits[row, places], top_k, temperature))
    return found


def _leading(logits: Tensor, top_k: int, temperature: float) -> Distributions:
    p = (logits.float() / temperature).softmax(-1)
    shares, ids = p.topk(min(top_k, p.shape[-1]), dim=-1)
    return _normalised(ids.cpu(), shares.cpu())


def _normalised(ids: Tensor, shares: Tensor) -> Distributions:
    mass = shares.sum(-1)
    return Distributions(ids, shares / mass.clamp_min(1e-12)[:, None] * (mass > 0)[:, None], mass)


def carried(
    rows: Distributions, sources: Sequence[int | None], vocabulary: VocabularyMap, top_k: int
) -> Distributions:
    """A teacher's rows for the target's labels, in the target's tokens.

    `sources` says which row belongs to each label, if any. Shares of tokens that go to one target
    token are added.
    """
    ids = torch.zeros(len(sources), top_k, dtype=torch.long)
    shares = torch.zeros(len(sources), top_k)
    for at, source in enumerate(sources):
        if source is None:
            continue
        gathered: dict[int, float] = {}
        row = zip(rows.ids[source].tolist(), rows.shares[source].tolist(), strict=True)
        for index, share in row:
            for target, part in zip(*vocabulary.row(index), strict=True):
                gathered[target] = gathered.get(target, 0.0) + share * part
        leading = sorted(gathered.items(), key=lambda item: (-item[1], item[0]))[:top_k]
        for column, (target, share) in enumerate(leading):
            ids[at, column], shares[at, column] = target, share * float(rows.mass[source])
    return _normalised(ids, shares)


def fuse_distributions(
    teachers: Sequence[Distributions],
    labels: Tensor,
    vocabulary: int,
    how: Fusing = "min-ce",
    top_k: int | None = None,
) -> tuple[Distributions, Tensor]:
    """One example's rows of several teachers as one, and each teacher's part in it [teachers].

    "min-ce" takes the rows of the teacher with the least mean cross-entropy to the labels [n];
    "avg-ce" all teachers' rows with weights softmax(-cross-entropy), where one says nothing the
    others' weights add up to 1. A teacher without any row has no part.
    """
    if how not in get_args(Fusing):
        raise unknown("way to fuse distributions", how, get_args(Fusing))
    if not teachers:
        raise PlaitError("fuse_distributions: give at least one teacher's rows.")
    means = [t.cross_entropy(labels, vocabulary).nanmean() for t in teachers]
    ce = torch.stack(means).double().nan_to_num(nan=torch.inf)
    if not bool(torch.isfinite(ce).any()):
        return teachers[0], torch.zeros(len(teachers))
    if how == "min-ce":
        best = int(ce.argmin())
        part = torch.zeros(len(teachers))
        part[best] = 1.0
        return teachers[best], part
    part = (-ce).softmax(0).float()
    width = top_k or max(t.ids.shape[1] for t in teachers)
    return _mixed(teachers, part, width), part


def _mixed(teachers: Sequence[Distributions], part: Tensor, top_k: int) -> Distributions:
    known = torch.stack([t.known for t in teachers], 1)
    weights = part * known
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
    count = len(weights)
    ids, shares = torch.zeros(count, top_k, dtype=torch.long), torch.zeros(count, top_k)
    mass = torch.stack([t.mass for t in teachers], 1)
    for at in range(count):
        gathered: dict[int, float] = {}
        for weight, teacher in zip(weights[at].tolist(), teachers, strict=True):
            row = zip(teacher.ids[at].tolist(), teacher.shares[at].tolist(), strict=True)
            for index, share in row:
                if weight * share:
                    gathered[index] = gathered.get(index, 0.0) + weight * share
        leading = sorted(gathered.items(), key=lambda item: (-item[1], item[0]))[:top_k]
        for column, (index, share) in enumerate(leading):
            ids[at, column], shares[at, column] = index, share
    kept = _normalised(ids, shares)
    return Distributions(ids, kept.shares, kept.mass * (weights * mass).sum(-1))


def labels_of(item: Encoded) -> Tensor:
    """The labels [n] that rows stand for."""
    return torch.tensor([item.labels[at] for at in predicted(item)], dtype=torch.long)


def coverage(rows: Sequence[Distributions]) -> dict[str, Any]:
    """The share of labels that have a row, and the mean probability that their rows kept."""
    total = sum(len(r.mass) for r in rows)
    known = sum(int(r.known.sum()) for r in rows)
    mass = sum(float((r.mass * r.known).sum()) for r in rows)
    return {"labels": total, "known": known / max(total, 1), "mass": mass / max(known, 1)}
