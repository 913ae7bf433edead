"""Learning which few parts of an adapter's change carry what it does.

    W0 x + sum_j sigmoid(z_j) (part j of dW) x      minimise the objective over z, then round

Parts are the singular triplets of dW at each site ("ranks", a handful a site) or its entries
("entries", the paper's, as many as W has). Nothing but z learns, and nothing is written into the
model: hooks on its sites add the masked change to what the base computes.
He et al., 2024, arXiv 2408.13656.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from plait.adapter import Delta, Site, adapters, first_input
from plait.errors import PlaitError, unknown
from plait.merging.masks import pack
from plait.merging.methods._spectral import triplets
from plait.merging.sources import delta_of
from plait.merging.statistics import union_of_sites
from plait.statistics.frozen import frozen
from plait.statistics.progress import track

Units = Literal["ranks", "entries"]
Objective = Callable[[nn.Module, int], Tensor]
SITES = ("linear", "conv", "embedding")


def localize(
    model: nn.Module,
    adapter: str,
    objective: Objective | None = None,
    *,
    units: Units = "ranks",
    density: float = 0.1,
    steps: int = 30,
    lr: float = 0.3,
    start: float = 3.0,
    l1: float = 0.0,
    keep: Literal["half", "density"] = "half",
    among: Sequence[str] = (),
) -> dict[str, Tensor]:
    """{site path: mask} for `merge(..., "localize-stitch", masks="learned", statistics=[...])`.

    Args:
        adapter: the name of one that is attached; the model runs with it alone.
        objective: `objective(model, step) -> scalar`, as `plait.merging.search.supervised` makes
            one of labelled batches; None keeps the mask of the start, which needs no data.
        units: "ranks" for space "factors", "entries" for space "delta". Of entries z and Adam's
            two moments take three numbers for every weight.
        density: share of the largest parts, over all sites together, that start out kept.
        steps, lr: of Adam on z. (The paper's plain descent needs a rate of 1e7 to 1e8, which hangs
            on how small the change is.)
        start: z is this for parts kept at the start, and minus this for the others.
        l1: weight of the masks' mean, sigmoid(z), in what is minimised: more keeps less.
        keep: parts with z > 0 at the end ("half"), or exactly `density` of them, by z.
        among: all adapters that will be merged: sites of any of them get a mask.

    Masks are packed, a bit for each part (`plait.merging.masks`); `save_statistics` writes them.
    Raises PlaitError for sites other than linear, convolution and embedding.
    """
    _check(units, density, steps, lr, keep)
    with torch.no_grad():
        sites = union_of_sites(model, list(dict.fromkeys([adapter, *among])))
        own = adapters(model)[adapter]
        parts = [
            _part(own.deltas[s.path], delta_of(own, adapter, s), units)
            for s in sites
            if s.path in own.deltas
        ]
        sizes = torch.cat([part.sizes for part in parts])
        kept = _largest(sizes, density)
    z = torch.where(kept, start, -start)
    if objective is not None:
        z = _learn(model, parts, objective, z, steps, lr, l1)
        kept = z > 0 if keep == "half" else _largest(z, density)
    pieces = kept.split([len(part.sizes) for part in parts])
    found = {part.site.path: pack(m) for part, m in zip(parts, pieces, strict=True)}
    empty = {s.path: 0 if units == "ranks" else s.out_features * s.in_features for s in sites}
    return {path: found.get(path, pack(torch.zeros(n))) for path, n in empty.items()}


@dataclass(frozen=True)
class Part:
    """One site's change with a factor for each of its parts; `sizes` [n] are their magnitudes."""

    site: Site
    sizes: Tensor
    change: Callable[[Tensor, Tensor], Tensor]
    """(input, factors [n]) -> what the output gains; differentiable in the factors."""
    bias: Tensor | None


def _part(delta: Delta, low: Any, units: Units) -> Part:
    site = delta.site
    if site.kind not in SITES:
        raise PlaitError(
            f"localize: site {site.path!r} is a {site.kind}; masks are learned for "
            f"{', '.join(SITES)} sites."
        )
    bias = delta.bias()
    if units == "ranks":
        U, S, V = (t.to(site.device, torch.float32) for t in triplets(low))
        B, A = U * S, V.mT

        def by_units(x: Tensor, m: Tensor) -> Tensor:
            dtype = x.dtype if x.is_floating_point() else A.dtype
            return site.apply_low_rank(x, A.to(dtype), (B * m.to(B)).to(dtype))

        return Part(site, S.cpu(), by_units, bias)
    dW = low.dense(torch.float32).to(site.device)

    def by_entries(x: Tensor, m: Tensor) -> Tensor:
        dtype = x.dtype if x.is_floating_point() else dW.dtype
        return site.apply(x, (dW * m.to(dW).view_as(dW)).to(dtype))

    return Part(site, dW.abs().flatten().cpu(), by_entries, bias)


def _largest(values: Tensor, density: float) -> Tensor:
    """A mask of exactly the share that is asked for, at least one, ties by position."""
    count = max(1, int(density * len(values) + 1e-6))
    kept = torch.zeros(len(values), dtype=torch.bool)
    kept[values.argsort(descending=True, stable=True)[:count]] = True
    return kept


def _learn(
    model: nn.Module,
    parts: Sequence[Part],
    objective: Objective,
    z: Tensor,
    steps: int,
    lr: float,
    l1: float,
) -> Tensor:
    z = z.clone().requires_grad_()
    steady = torch.optim.Adam([z], lr=lr)
    with frozen(model), torch.enable_grad():
        for step in track(range(steps), "localising"):
            total = masked_value(model, parts, objective, z, step) + l1 * z.sigmoid().mean()
            if not bool(torch.isfinite(total)):
                raise PlaitError(f"localize: the objective is {float(total)} at step {step}.")
            (z.grad,) = torch.autograd.grad(total, z)
            steady.step()
    return z.detach()


def masked_value(
    model: nn.Module, parts: Sequence[Part], objective: Objective, z: Tensor, step: int
) -> Tensor:
    """The objective of the base with sigmoid(z) [n] times the parts, differentiable in z."""
    factors = z.sigmoid().split([len(part.sizes) for part in parts])
    with _added(parts, factors):
        return objective(model, step).to(z.device)


@contextmanager
def _added(parts: Sequence[Part], factors: Sequence[Tensor]) -> Iterator[None]:
    def hook(part: Part, m: Tensor) -> Any:
        def add(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            change = part.change(first_input(args, kwargs), m).to(output.dtype)
            if part.bias is not None:
                behind = output.dim() - 2 if part.site.kind == "conv" else 0
                change = change + part.bias.detach().to(output).reshape(-1, *[1] * behind)
            return output + change

        return add

    handles = [
        part.site.base.register_forward_hook(hook(part, m), with_kwargs=True)
        for part, m in zip(parts, factors, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(units: str, density: float, steps: int, lr: float, keep: str) -> None:
    if units not in get_args(Units):
        raise unknown("units", units, get_args(Units))
    if keep not in ("half", "density"):
        raise unknown("keep", keep, ("half", "density"))
    if not 0 < density <= 1 or steps < 0 or lr <= 0:
        raise PlaitError(
            f"localize: density ({density}) lies in (0, 1], steps ({steps}) is 0 or more, and lr "
            f"({lr}) is greater than 0."
        )
