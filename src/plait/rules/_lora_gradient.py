"""The gradient of a frozen weight as its LoRA sees it, and what it says about groups of units.

A step of gradient descent with rate 1 moves B A by -G, the estimate of dL/dW's own step:

    G = g_B A + B g_A - g_B g_A      g_A, g_B = dL/dA, dL/dB

The importance of an entry is (G (W + s B A))^2, what the loss would change if it were 0, squared.
No gradient of W is ever computed. Zhang et al., "LoRAPrune", 2023, arXiv 2305.18403.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from plait.adapter import Pair
from plait.structure import Group

Vectors = dict[str, dict[int, Tensor]]
"""{weight: {its dimension: one number for each entry there}}."""


def estimated_gradient(A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor) -> Tensor:
    """G [out, in] from a pair [r, in], [out, r] and its gradients."""
    # (B - g_B)(A - g_A) = B A - G; the middle terms share one product.
    return torch.cat([g_B, B], 1) @ torch.cat([A - g_A, g_A], 0)


@torch.no_grad()
def entry_importance(pair: Pair) -> Tensor | None:
    """(G (W + s B A))^2 [out, in] at the gradients of this step; None where there are none."""
    if pair.A.grad is None or pair.B.grad is None:
        return None
    A, B = pair.A.float(), pair.B.float()
    G = estimated_gradient(A, B, pair.A.grad.float(), pair.B.grad.float())
    W = pair.delta.site.weight().detach().float()
    return (G * (W + pair.scale * (B @ A))).square_()


def along_dims(site_path: str, importance: Tensor, stored_turned: bool) -> Vectors:
    """Sums over rows and columns, by the dimensions of the weight as it is stored."""
    rows, columns = importance.sum(1).cpu(), importance.sum(0).cpu()
    found = {0: columns, 1: rows} if stored_turned else {0: rows, 1: columns}
    return {f"{site_path}.weight": found}


def unit_scores(
    groups: Iterable[Group], vectors: Mapping[str, Mapping[int, Tensor]]
) -> dict[str, Tensor]:
    """{group: [size]}: each layer's sums divided by their norm over the units, then added up.

    Groups of which no weight is in `vectors` are left out.
    """
    found: dict[str, Tensor] = {}
    for group in groups:
        parts = []
        for slot in group.slots:
            entries = vectors.get(slot.tensor, {}).get(slot.dim)
            if entries is not None:
                score = slot.gather(entries.double(), group.size)
                parts.append(score / (score.norm() + 1e-8))
        if parts:
            found[group.name] = torch.stack(parts).sum(0)
    return found
