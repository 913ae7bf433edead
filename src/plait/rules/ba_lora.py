"""BA-LoRA: three losses on the outputs against what a base has wrongly learned.

    loss + consistency * L_CR + diversity * L_DR + svd * L_SVDR          z: logits, z0: the base's

                       nlu: z [samples, classes]              nlg: z [tokens, vocabulary]
    L_CR   stay near   mean (z/||z|| - z0/||z0||)^2           KL(softmax z0 || softmax z)
    L_DR   spread out  sum_{i != j} Cov(z)_ij^2 / classes     sum p log p, p = softmax z
    L_SVDR few dirs    - (s_1 + .. + s_k) / sum s             the same; s: singular values of z

z0 comes from the same model without its adapters, one forward without gradients for every
micro-batch, in the same mode. The paper starts at PiSSA with alpha = r, which here holds its start
back: `method: pissa, rules: [ba-lora]`; the model without the adapter is then the base itself, and
no second copy of it is loaded (a head that trains along answers there as it was). Prompts and
padding count nowhere. Departures from the released code: it does not mask; it sums KL over a
sample's tokens, where this is the mean over tokens (for answers of n tokens `consistency` n times
as large is the same); it computes the singular values without gradient, of whole samples as rows.
Terms depend on which rows share a micro-batch.
Paper: Chang, Chang and Wu, 2024, arXiv 2408.04556.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.adapter import Method, Rule, Run
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.rules._output_losses import (
    concentration,
    covariance,
    distance,
    divergence,
    negative_entropy,
)
from plait.rules._passes import Pass, Passes, logits_of, refuse_trained_base


@dataclass
class BaLora(Rule):
    form: Literal["auto", "nlu", "nlg"] = "auto"
    """Losses for classes or for tokens; auto: tokens where logits have more than two axes."""
    consistency: float = 1e-4
    """Weight of L_CR (paper: 1e-4); 0 saves the base's forward."""
    diversity: float = 3e-4
    """Weight of L_DR (paper: 3e-4, for some models 4e-4)."""
    svd: float = 1e-4
    """Weight of L_SVDR (paper: 1e-4)."""
    k: int = 3
    """Singular values that are to hold the most (paper: 3, for generation up to 50)."""
    svd_rows: int = 512
    """Most rows that singular values are taken of; the time grows with their cube."""

    splits_batches = False

    def __post_init__(self) -> None:
        check_choices(self, "ba-lora")
        for name in ("consistency", "diversity", "svd"):
            if getattr(self, name) < 0:
                raise PlaitError(f"ba-lora: {name} must be at least 0, not {getattr(self, name)}.")
        if self.k < 1 or self.svd_rows < 1:
            raise PlaitError(f"ba-lora: k and svd_rows must be at least 1, not {self!r}.")

    def check(self, run: Run) -> None:
        super().check(run)
        if self.consistency:
            refuse_trained_base(run, "BaLora", "use consistency 0")

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._passes = Passes(run.model)

    def extra_loss(self) -> Tensor | None:
        done = self._passes.take()
        if done is None:
            return None
        z = done.predictions()
        if len(z) == 0:
            return None
        found = [weight * term for weight, term in self._terms(done, z)]
        return torch.stack(found).sum() if found else None

    def _terms(self, done: Pass, z: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Each term in use, with its weight."""
        tokens = logits_of(done.output).dim() > 2 if self.form == "auto" else self.form == "nlg"
        if self.consistency:
            near = divergence if tokens else distance
            yield self.consistency, near(z, self._passes.of_base(done))
        if self.diversity:
            yield self.diversity, negative_entropy(z) if tokens else covariance(z)
        if self.svd:
            yield self.svd, concentration(z, self.k, self.svd_rows)

    def finish(self) -> None:
        self._passes.close()


METHOD = Method(
    name="ba-lora",
    title="BA-LoRA: regularised outputs against an inherited bias",
    paper="Chang et al., 2024, arXiv 2408.04556",
    axis="rule",
    rule=BaLora,
)
