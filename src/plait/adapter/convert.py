"""Any adapter as a plain LoRA, exact where dW is low-rank and the best approximation elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.adapter.adapter import Adapter
from plait.adapter.build import build_adapter
from plait.adapter.delta import Delta
from plait.adapter.pair import PairDelta
from plait.adapter.registry import get_method
from plait.adapter.site import Site
from plait.errors import PlaitError
from plait.linalg import LowRank

DEFAULT_ENERGY = 0.999


def to_lora(adapter: Adapter, rank: int | None = None, energy: float | None = None) -> Adapter:
    """A LoRA adapter against the ORIGINAL base with the same dW (alpha = r, so scaling 1).

    Args:
        rank: cut every site to this rank (best rank-r approximation).
        energy: keep this share of each site's squared Frobenius norm. With neither, deltas that
            have exact factors are exported exactly, others at energy 0.999.

    `result.info["dropped_energy"]` gives the share lost per site. Raises PlaitError for deltas that
    are not linear in their input.
    """
    lows, dropped = {}, {}
    for path, delta in adapter.deltas.items():
        lows[path], dropped[path] = low_rank_of(delta, rank, energy)
    biases = {path: bias for path, d in adapter.deltas.items() if (bias := d.bias()) is not None}
    info = {**adapter.info, "converted_from": adapter.method.name, "dropped_energy": dropped}
    sites = [delta.site for delta in adapter.deltas.values()]
    return lora_from(adapter.name, sites, lows, biases, seed=adapter.seed, info=info)


def lora_from(
    name: str,
    sites: Sequence[Site],
    lows: Mapping[str, LowRank],
    biases: Mapping[str, Tensor],
    *,
    seed: int = 0,
    info: Mapping[str, Any] | None = None,
) -> Adapter:
    """A LoRA of scaling 1, attached to nothing, whose change at each site is `lows[path]`.

    With any of `biases` ({path: change of the bias}) every site has one, 0 where none is given.
    """
    lora: Any = get_method("lora")

    def options(rank: int) -> Any:
        return lora.options(rank=rank, alpha=float(rank), bias=bool(biases))

    result = build_adapter(
        name,
        lora,
        [(site.bare(), lora.delta) for site in sites],
        options(max((low.rank for low in lows.values()), default=0)),
        by_site={path: options(low.rank) for path, low in lows.items()},
        seed=seed,
        dtype=next(iter(lows.values())).dtype if lows else None,
        info=info,
    )
    for path, low in lows.items():
        delta = result.deltas[path]
        assert isinstance(delta, PairDelta)
        delta.set_pair(low.A, low.B * low.scale)
        if path in biases:
            delta.get_parameter("c").data.copy_(biases[path])
    return result


def low_rank_of(
    delta: Delta, rank: int | None = None, energy: float | None = None
) -> tuple[LowRank, float]:
    """dW of one delta as a LowRank, and the share of its energy that was dropped."""
    if not delta.traits.linear_in_x:
        raise PlaitError(
            f"the delta at {delta.site.path!r} ({type(delta).__name__}) is not linear in its "
            "input, so no LoRA equals it."
        )
    with torch.no_grad():
        low = delta.factors()
        if low is not None:
            exact = rank is None and energy is None
            if exact or (energy is None and rank is not None and low.rank <= rank):
                return low, 0.0
            return low.truncate(rank=rank, energy=energy)
        dense = delta.dense()
        if dense.dim() != 2:
            raise PlaitError(
                f"{delta.site.path!r} is a packed tensor; export it in Plait's format."
            )
        if rank is None and energy is None:
            energy = DEFAULT_ENERGY
        U, S, Vh = torch.linalg.svd(dense.float(), full_matrices=False)
        full = LowRank(B=(U * S.sqrt()).to(dense.dtype), A=(S.sqrt()[:, None] * Vh).to(dense.dtype))
        return full.truncate(rank=rank, energy=energy)
