"""Distil: learn from a teacher's distributions beside the labels.

    loss = ce CE(label, p) + (1 - ce) KL(q || p)        p: of the model, q: of the teacher

`rows` is a file of the teacher's leading tokens and their shares for every label of the training
data (`plait.transfer.fuse` makes it, of one teacher or several, whatever their tokenizers). Without
it the teacher is the base itself: the same model without its adapters, one more forward. Where the
file has nothing to say the label counts alone, as a teacher that is sure of it. With sparse rows
the two terms' normalisers cancel, so that the loss costs a look-up:

    KL(q || p) - CE(label, p) = sum_j q_j (log q_j - z_j) + z_label          z: the model's logits

Paper: FuseLLM, Wan et al., 2024, arXiv 2401.10491 (ce 0.9); Hinton et al., 2015, arXiv 1503.02531.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Method, Rule, Run
from plait.errors import PlaitError
from plait.linalg.precision import working_dtype
from plait.rules._cached_rows import CachedRows
from plait.rules._output_losses import divergence
from plait.rules._passes import Passes, refuse_trained_base


@dataclass
class Distil(Rule):
    rows: str | None = None
    """A file of the teacher's rows; None takes the base as the teacher."""
    ce: float = 0.9
    """Weight of the labels' cross-entropy (paper: 0.9); the teacher has the rest."""

    splits_batches = False  # a mean over the micro-batch's own labels

    def __post_init__(self) -> None:
        if not 0 <= self.ce <= 1:
            raise PlaitError(f"distil: ce is a share in [0, 1], not {self.ce}.")

    def check(self, run: Run) -> None:
        super().check(run)
        if self.rows is None:
            refuse_trained_base(run, "Distil", "give rows of a teacher")

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._cache = None if self.rows is None else CachedRows(self.rows)
        self._passes = Passes(run.model)

    def extra_loss(self) -> Tensor | None:
        done = self._passes.take()
        if done is None or self.ce == 1:
            return None
        z, labels = done.predictions(), done.targets()
        if not len(labels):
            return None
        if self._cache is None:
            excess = divergence(z, self._passes.of_base(done)) - F.cross_entropy(_wide(z), labels)
        else:
            ids, shares = self._cache.find(done.kwargs)
            excess = sparse_excess(z, labels, ids.to(z.device), shares.to(z.device))
        return (1 - self.ce) * excess

    def finish(self) -> None:
        self._passes.close()


def sparse_excess(z: Tensor, labels: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
    """The mean over n labels of KL(q || p) - CE(label, p); 0 for rows without shares.

    Logits z [n, V], labels [n], token ids [n, k] and their shares [n, k], which add up to 1.
    """
    if len(ids) != len(z):
        raise PlaitError(f"distil: {len(ids)} rows of the teacher for {len(z)} labels.")
    if ids.numel() and int(ids.max()) >= z.shape[-1]:
        raise PlaitError("distil: rows name tokens that the model does not have; make them again.")
    q = shares.to(working_dtype(z.dtype))
    known = q.sum(-1) > 0
    inside = torch.xlogy(q, q).sum(-1) - (q * _wide(z.gather(-1, ids))).sum(-1)
    gold = _wide(z.gather(-1, labels[:, None])).squeeze(-1)
    return ((inside + gold) * known).sum() / len(z)


def _wide(z: Tensor) -> Tensor:
    return z.to(working_dtype(z.dtype))


METHOD = Method(
    name="distil",
    title="Distil: a teacher's distributions beside the labels",
    paper="Wan et al., 2024, arXiv 2401.10491",
    axis="rule",
    rule=Distil,
)
