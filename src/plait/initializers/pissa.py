"""PiSSA: start a pair at W's principal singular directions, so that training moves them first.

    W = U S V^T        B = U_r sqrt(S_r / s)        A = sqrt(S_r / s) V_r^T

so that s B A is W's best rank-r approximation, with s the pair's scaling. What the paper subtracts
from W is held back in the adapter instead: the base stays what it is, also for other adapters on
it, the model starts at the base, and the adapter exports as a plain LoRA of rank 2r against W.
Works with any method that trains a pair: attach(model, "dora", initializer="pissa").
Paper: Meng et al., 2024, arXiv 2404.02948. Parameters: r (in + out) a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from plait.adapter import Delta, Initializer, Method
from plait.initializers._pairs import require_pair, set_leading
from plait.linalg import krylov_svd
from plait.methods.lora import METHOD as LORA
from plait.methods.lora import LoraDelta, LoraOptions


@dataclass
class Pissa(Initializer):
    svd: Literal["randomized", "exact"] = "randomized"
    """A sketch's block Krylov space, or the full SVD, which takes several times as long."""
    depth: int = 20
    """Powers of W in that space. The paper's 4 to 16 plain power iterations do not reach the
    leading subspace of weights whose singular values lie within a percent of each other; this
    does, to 1e-3 rad on SmolLM2."""

    def start(self, delta: Delta, statistics: Any) -> None:
        pair = require_pair(delta, "pissa")
        rank = min(pair.rank, *pair.site.shape[-2:])  # packed experts are a stack of matrices
        if rank == 0:
            return
        W = pair.base_weight()
        if self.svd == "exact":
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            g = pair.generator("pissa")
            U, S, Vh = krylov_svd(W, rank, depth=self.depth, generator=g)
        root = (S[..., :rank] / pair.scaling).sqrt()
        A, B = root.unsqueeze(-1) * Vh[..., :rank, :], U[..., :rank] * root.unsqueeze(-2)
        set_leading(pair, A, B)
        pair.hold_back()


METHOD = Method(
    name="pissa",
    title="PiSSA: principal singular values and singular vectors adaptation",
    paper="Meng et al., 2024, arXiv 2404.02948",
    axis="initialisation",
    options=LoraOptions,
    delta=LoraDelta,
    count=LORA.count,
    initializer=Pissa,
)
