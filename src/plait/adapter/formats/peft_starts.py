"""Starts that took something out of W (PiSSA, OLoRA), in PEFT folders that were not converted.

Such a folder holds factors against the residual base. What was taken out follows from W where no
data or chance was involved; it is computed again and held back, so that the adapter acts on the
original base. The others are refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plait.adapter.pair import PairDelta
from plait.errors import FormatError


def _principal(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def _leading_qr(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(W)
    return R[:r], Q[:, :r]


RESIDUAL: dict[str, tuple[Callable[[Tensor, int], tuple[Tensor, Tensor]], bool]] = {
    "pissa": (_principal, True),
    "olora": (_leading_qr, False),
}
"""{init_lora_weights: (what it took out of W as A, B; whether that is divided by the scaling)}."""

LOST = {
    "pissa_niter": "a randomised SVD",
    "corda": "covariances of training data",
    "lora_ga": "gradients of training data",
    "loftq": "a quantised base",
}
"""Starts that cannot be computed again, and what they were made from."""


def hold_back_start(delta: PairDelta, start: str) -> None:
    for name, source in LOST.items():
        if start.startswith(name):
            raise FormatError(
                f"init_lora_weights={start!r}: the factors belong to a base that was changed with "
                f"{source}, which is not in the folder; save it from PEFT with "
                "path_initial_model_for_weight_conversion=..., which converts it to a plain LoRA."
            )
    if start not in RESIDUAL or delta.site.kind != "linear":
        return
    if delta.site.module is None:
        raise FormatError(
            f"init_lora_weights={start!r}: what was taken out of the base must be computed from "
            "it; pass model= (or use plait.load)."
        )
    compute, divided = RESIDUAL[start]
    with torch.no_grad():
        A, B = compute(delta.site.weight().detach().float(), delta.rank)
        delta.allocate_held(delta.rank)
        held_A, held_B = delta.get_buffer("held_A"), delta.get_buffer("held_B")
        held_A.copy_(A)
        held_B.copy_(B / delta.scaling if divided else B)
