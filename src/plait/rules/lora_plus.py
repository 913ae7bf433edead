"""LoRA+: B learns faster than A.

    A ──► lr            B, vectors ──► ratio * lr            embeddings' pairs ──► embedding_lr

For a layer of width n, updates of A and B contribute alike to the features only when
lr_B / lr_A = Theta(n); with equal rates B learns too slowly. The rule only makes optimiser groups,
so it costs nothing, and a scheduler (which scales every group's own rate) keeps the ratios.
One-dimensional tensors beside the pairs (biases) go with B and are not decayed, as in the paper's
code.
Paper: Hayou, Ghosh and Yu, 2024, arXiv 2402.12354.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plait.adapter import Method, Rule, Run, split_group
from plait.errors import PlaitError


@dataclass
class LoraPlus(Rule):
    ratio: float = 16.0
    """lr_B / lr_A; the paper tries 2 to 24 and advises 16, the base rate slightly below LoRA's."""
    embedding_lr: float | None = 1e-6
    """Learning rate of pairs on embeddings; None treats them as any other."""

    def __post_init__(self) -> None:
        if self.ratio <= 0:
            raise PlaitError(f"lora-plus: ratio must be above 0, not {self.ratio}.")

    def check(self, run: Run) -> None:
        super().check(run)
        if not run.pairs():
            raise PlaitError(
                "rule LoraPlus needs (A, B) pairs, and no training adapter has one; use a method "
                "such as lora."
            )

    def parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        pairs = self.run.pairs()
        embedded = [p for p in pairs if p.delta.site.kind == "embedding"]
        slow = {id(t) for p in embedded for t in (p.A, p.B)} if self.embedding_lr else set()
        fast = {id(p.B) for p in pairs}
        made = []
        for group in groups:
            embedding, rest = split_group(group, lambda _, p: id(p) in slow)
            upper, rest = split_group(rest, lambda _, p: id(p) in fast)
            vectors, lower = split_group(rest, lambda _, p: p.ndim == 1)
            for part in (upper, vectors):
                part["lr"] = group["lr"] * self.ratio
            vectors["weight_decay"] = 0.0
            embedding["lr"] = self.embedding_lr or group["lr"]
            made += [lower, upper, vectors, embedding]
        return made


METHOD = Method(
    name="lora-plus",
    title="LoRA+: a higher learning rate for B",
    paper="Hayou et al., 2024, arXiv 2402.12354",
    axis="rule",
    rule=LoraPlus,
)
