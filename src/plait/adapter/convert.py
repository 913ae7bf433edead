"""Any adapter as a plain LoRA, exact where dW is low-rank and the best approximation elsewhere."""

from __future__ import annotations

import torch

from plait.adapter.adapter import Adapter
from plait.adapter.build import build_adapter
from plait.adapter.delta import Delta
from plait.adapter.pair import PairDelta
from plait.adapter.registry import get_method
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
    lora = get_method("lora")
    sites, lows, dropped = [], {}, {}
    for path, delta in adapter.deltas.items():
        low, lost = low_rank_of(delta, rank, energy)
        sites.append(delta.site.bare())
        lows[path], dropped[path] = low, lost
    assert lora.delta is not None
    with_bias = any(d.bias() is not None for d in adapter.deltas.values())
    by_site = {
        p: lora.options(rank=low.rank, alpha=float(low.rank), bias=with_bias)  # type: ignore[call-arg]
        for p, low in lows.items()
    }
    top = max((low.rank for low in lows.values()), default=0)
    options = lora.options(rank=top, alpha=float(top), bias=with_bias)  # type: ignore[call-arg]
    result = build_adapter(
        adapter.name,
        lora,
        [(s, lora.delta) for s in sites],
        options,
        by_site=by_site,
        seed=adapter.seed,
        dtype=next(iter(lows.values())).dtype if lows else None,
        info={**adapter.info, "converted_from": adapter.method.name, "dropped_energy": dropped},
    )
    _fill(result, adapter, lows)
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


def _fill(result: Adapter, source: Adapter, lows: dict[str, LowRank]) -> None:
    with torch.no_grad():
        for path, low in lows.items():
            target = result.deltas[path]
            assert isinstance(target, PairDelta)
            target.set_pair(low.A, low.B * low.scale)
            bias = source.deltas[path].bias()
            if bias is not None:
                target.get_parameter("c").copy_(bias)
