"""OLoRA: start a pair at an orthonormal basis of W's first r columns.

    W[:, :r] = Q R (thin QR)        B = Q        A = Q^T W

so that B A = Q Q^T W is the part of W that those columns span, and A has the first r rows of the
whole W's R: only r columns are factorised, no SVD and not even all of W's QR. The columns' order is
arbitrary. What the paper subtracts from W is held back in the adapter, as in `pissa`: the base
stays what it is, the model starts at the base, and the adapter exports as a plain LoRA of rank 2r
against W. With scaling s the start is s B A, not divided by s as in PiSSA; with s = 1 the residual
W - B A has zeros in its first r columns. Works with any method that trains a pair.
Paper: Büyükakyüz, 2024, arXiv 2406.01775. Parameters: r (in + out) a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from plait.adapter import Delta, Initializer, Method
from plait.initializers._pairs import require_pair, set_leading
from plait.methods.lora import METHOD as LORA
from plait.methods.lora import LoraDelta, LoraOptions


@dataclass
class Olora(Initializer):
    """No options: there is one QR decomposition."""

    def start(self, delta: Delta, statistics: Any) -> None:
        pair = require_pair(delta, "olora")
        rank = min(pair.rank, *pair.site.shape[-2:])  # packed experts are a stack of matrices
        W = pair.base_weight()
        Q = torch.linalg.qr(W[..., :rank]).Q
        set_leading(pair, A=Q.mT @ W, B=Q)
        pair.hold_back()


METHOD = Method(
    name="olora",
    title="OLoRA: orthonormal low-rank adaptation",
    paper="Büyükakyüz, 2024, arXiv 2406.01775",
    axis="initialisation",
    options=LoraOptions,
    delta=LoraDelta,
    count=LORA.count,
    initializer=Olora,
)
