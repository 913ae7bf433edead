"""A pair cut to a lower rank while it trains: the best dW of that rank, and the moments with it.

    s B A = U S V^T  (by QR of both factors)      B' = U_k (S_k / s)^(1/2) = B P      A' = Q A
    P [r, k] = s^(1/2) A V_k S_k^(-1/2)           Q [k, r] = s^(1/2) S_k^(-1/2) U_k^T B

The gradient of B' is that of B times Q^T, the gradient of A' is P^T times that of A: exactly so at
the moment of the cut, which is how first moments go on. Second moments go by the squares of the
coefficients, as if the entries of a gradient were independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import PairDelta
from plait.linalg import LowRank, column_signs

FIRST = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
SECOND = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
"""What optimisers call averages of gradients, and of their squares."""


@dataclass(frozen=True)
class Squeezed:
    B: Tensor
    A: Tensor
    P: Tensor
    Q: Tensor
    dropped: float
    """Share of the squared norm of dW that is gone."""


def squeezed(low: LowRank, rank: int, table: bool = False) -> Squeezed:
    """`low` at `rank` and the same scale (above 0), both factors with the same spectrum.

    A component of no size at all has B 0 and a row of A that can learn; on a `table` (an
    embedding's A) it is the other way round.
    """
    U, S, Vh = (t.detach() for t in low.svd())
    squares = S.double().square()
    total = float(squares.sum())
    dropped = float(squares[..., rank:].sum()) / total if total else 0.0
    noise = S[..., :1] * torch.finfo(S.dtype).eps * max(low.shape[-2:])
    U, S, Vh = U[..., :rank], S[..., :rank], Vh[..., :rank, :]
    signs = column_signs(U)
    U, Vh = U * signs, signs.mT * Vh
    alive = noise < S
    size = torch.where(alive, S / low.scale, 0).sqrt()
    # As long as what LoRA draws: rows of U(-1/sqrt(in), 1/sqrt(in)), columns of N(0, 1).
    idle = torch.where(alive, 0, math.sqrt(low.shape[-2]) if table else math.sqrt(1 / 3))
    B = U * (size + idle if table else size).unsqueeze(-2)
    A = (size if table else size + idle).unsqueeze(-1) * Vh
    inverse = torch.where(alive, (low.scale / S).sqrt(), 0)
    P = (low.A.to(U) @ Vh.mT) * inverse.unsqueeze(-2)
    Q = inverse.unsqueeze(-1) * (U.mT @ low.B.to(U))
    return Squeezed(B, A, P, Q, dropped)


@torch.no_grad()
def squeeze(delta: PairDelta, rank: int, optimizer: Any, project: bool) -> float:
    """Cut one delta to `rank`; returns the share of its energy that is dropped.

    Its moments in `optimizer` are projected, or begin anew.
    """
    cut = squeezed(delta.trained(), rank, table=delta.site.kind == "embedding")
    states: Any = {} if optimizer is None else getattr(optimizer, "optimizer", optimizer).state
    maps: dict[str, Callable[[Tensor, bool], Tensor]] = {
        "A": lambda m, squared: _squared(cut.P, squared).mT.to(m) @ m,
        "B": lambda m, squared: m @ _squared(cut.Q, squared).mT.to(m),
    }
    memory = {
        name: _projected(states.get(delta.get_parameter(name)), delta.get_parameter(name), f)
        if project
        else None
        for name, f in maps.items()
    }
    delta.keep(range(cut.A.shape[-2]), optimizer)
    delta.set_pair(cut.A, cut.B)
    for name, state in memory.items():
        parameter = delta.get_parameter(name)
        states.pop(parameter, None)
        if state:
            states[parameter] = state
    return cut.dropped


def _squared(coefficients: Tensor, squared: bool) -> Tensor:
    return coefficients.square() if squared else coefficients


def _projected(
    state: dict[str, Any] | None, old: nn.Parameter, carry: Callable[[Tensor, bool], Tensor]
) -> dict[str, Any] | None:
    """The state of the new parameter; None where something in it has no known meaning."""
    found = {}
    for key, value in (state or {}).items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            if key not in FIRST | SECOND:
                return None
            value = carry(value, key in SECOND)
        found[key] = value
    return found or None
