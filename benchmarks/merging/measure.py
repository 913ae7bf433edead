"""What a merge is worth: accuracy and loss on every task, with the change folded into the base.

Nothing may be attached to the scorer meanwhile: the fold is into its own weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean

import torch
from benchmarks.merging.scorer import Scorer
from torch import Tensor

from plait.adapter import Adapter, low_rank_of
from plait.linalg import LowRank

Batches = Sequence[Mapping[str, Tensor]]
Score = dict[str, float]


def changes(adapter: Adapter) -> dict[str, LowRank]:
    """{site path: its exact change}."""
    with torch.no_grad():
        return {path: low_rank_of(delta)[0] for path, delta in adapter.deltas.items()}


@torch.no_grad()
def norm(change: Mapping[str, LowRank]) -> float:
    """Frobenius norm over all sites."""
    return sum(float(low.dense().double().square().sum()) for low in change.values()) ** 0.5


@contextmanager
def folded(scorer: Scorer, change: Mapping[str, LowRank], scale: float = 1.0) -> Iterator[None]:
    """The scorer with `scale` times the change in its weights, in bfloat16 (which halves the time
    of an evaluation on processors that have it); afterwards it is exactly as before."""
    before = {name: p.data for name, p in scorer.named_parameters()}
    changed = {
        f"{path}.weight": before[f"{path}.weight"] + scale * low.dense().float()
        for path, low in change.items()
    }
    try:
        for name, p in scorer.named_parameters():
            p.data = changed.get(name, before[name]).bfloat16()
        yield
    finally:
        for name, p in scorer.named_parameters():
            p.data = before[name]


@torch.no_grad()
def score(scorer: Scorer, batches: Batches) -> Score:
    """{"accuracy", "loss", "rows"} of one task."""
    right, loss, rows = 0, 0.0, 0
    for batch in batches:
        answer = scorer(**batch)
        right += int((answer.logits.argmax(1) == batch["labels"]).sum())
        loss += float(answer.loss) * len(batch["labels"])
        rows += len(batch["labels"])
    return {"accuracy": right / rows, "loss": round(loss / rows, 4), "rows": rows}


def score_all(
    scorer: Scorer, tasks: Mapping[str, Batches], change: Mapping[str, LowRank], scale: float = 1.0
) -> dict[str, Score]:
    """{task: its score} of one merge."""
    with folded(scorer, change, scale):
        return {name: score(scorer, batches) for name, batches in tasks.items()}


def normalised(
    found: Mapping[str, Score], experts: Mapping[str, float], names: Sequence[str]
) -> list[float]:
    """Accuracy over the accuracy of the task's own expert, task by task."""
    return [found[name]["accuracy"] / experts[name] for name in names]


def recovered(
    found: Mapping[str, Score],
    base: Mapping[str, Score],
    experts: Mapping[str, float],
    names: Sequence[str],
) -> float:
    """How much of the way from the base to the experts: 0 the base, 1 the experts, in the mean."""
    gained = fmean(found[n]["accuracy"] - base[n]["accuracy"] for n in names)
    return gained / fmean(experts[n] - base[n]["accuracy"] for n in names)
