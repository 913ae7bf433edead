"""LoRA Soups CAT: one coefficient for every adapter at every site, of a softmax over the adapters.

    dW at site l = W sum_i a_i dW_i     a = softmax_i(log w_i + c[l, i])     W = sum of the w_i

Concatenated factors, so the sum is exact. The logits c are what the paper trains on a little data
of the mixed skill; here they are given: by site, or one row for all sites. Without any the merge is
the weighted sum, which is where training starts. `softmax=False` takes the numbers as factors
themselves, w_i c[l, i], which may also be above 1 or below 0.
Paper: Prabhakar et al., 2024, arXiv 2410.13025.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from plait.errors import PlaitError
from plait.merging.method import MergeMethod
from plait.merging.methods._shares import SharesMerge


@dataclass
class LoraSoupsCat(SharesMerge):
    logits: Mapping[str, Sequence[float]] | Sequence[float] | None = None
    """c: {site path: one number for each input}, or one row for all sites; sites that are not
    named have none."""
    softmax: bool = True
    """Turn the numbers into shares (the paper's code); else they are factors."""

    def shares(self, path: str, weights: Sequence[float]) -> list[float]:
        """The coefficients at one site (a bias has its site's)."""
        given = self.logits
        if isinstance(given, Mapping):
            given = given.get(path, given.get(path.removesuffix(".bias")))
        if given is None:
            return list(weights)
        if len(given) != len(weights):
            raise PlaitError(
                f"lora-soups-cat: {len(given)} logits for {len(weights)} inputs at {path!r}; give "
                "one for each."
            )
        own = torch.tensor(list(weights), dtype=torch.float64)
        c = torch.tensor(list(given), dtype=torch.float64)
        if not self.softmax:
            return (own * c).tolist()
        found = own * (c - c.max()).exp()
        total = float(found.sum())
        return (found * (float(own.sum()) / total if total else 0.0)).tolist()


METHOD = MergeMethod(
    name="lora-soups-cat",
    title="LoRA Soups CAT: a coefficient for every adapter at every site",
    paper="Prabhakar et al., 2024, arXiv 2410.13025",
    merge=LoraSoupsCat,
)
