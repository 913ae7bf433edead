"""What merges may ask of data: a Gram matrix or a diagonal Fisher of every site, for each input.

    model + adapter i active + its data ──► {site path: tensor} ──► merge(..., statistics=[...])

`gram` needs inputs alone, `fisher` labels (or a loss). `save_statistics` writes either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.adapter import Adapter, Site, adapters, low_rank_of
from plait.errors import PlaitError
from plait.merging.sources import labelled
from plait.merging.spaces import align
from plait.merging.stored import save_statistics
from plait.statistics import SecondMoment, activation_pass, gradient_pass
from plait.statistics.gradients import Loss

Batches = Iterable[Mapping[str, Any]]

__all__ = ["fisher", "gram", "save_statistics", "shared_bases", "union_of_sites"]


def union_of_sites(model: nn.Module, names: Sequence[str]) -> list[Site]:
    """The sites at which at least one of these attached adapters acts, in their order."""
    found: dict[str, Site] = {}
    for adapter in _attached(model, names):
        for path, delta in adapter.deltas.items():
            found.setdefault(path, delta.site)
    return list(found.values())


def gram(
    model: nn.Module,
    adapter: str,
    batches: Batches,
    *,
    among: Sequence[str] = (),
    form: Literal["full", "diagonal"] = "full",
) -> dict[str, Tensor]:
    """{site path: X^T X / tokens}, float32, of what sites read while `adapter` is active.

    Args:
        adapter: the name of one that is attached; the others are switched off.
        batches: dicts for `model(**batch)`; padding and tokens labelled -100 do not count.
        among: all that will be merged; sites of any of them are covered (None: its own).
        form: "full" [in, in], or its "diagonal" [in].

    Sites that read the same tensor share one Gram (one object, and one entry of a file).
    """
    sites = union_of_sites(model, list(among) or [adapter])
    found = activation_pass(model, sites, batches, SecondMoment(), active=adapter)
    if form == "full":
        return found
    cut = {id(matrix): matrix.diagonal().clone() for matrix in found.values()}
    return {path: cut[id(matrix)] for path, matrix in found.items()}


def shared_bases(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """{site path: U [out, p]}: the bases in which space "aligned" merges these adapters.

    The order of the adapters does not matter.
    """
    inputs = _attached(model, names)
    bases = {}
    with torch.no_grad():
        for site in union_of_sites(model, names):
            here = [a.deltas[site.path] for _, a in labelled(inputs) if site.path in a.deltas]
            lows = [low_rank_of(delta, energy=1.0)[0].to("cpu") for delta in here]
            bases[site.path] = align(lows)[0]
    return bases


def fisher(
    model: nn.Module,
    adapter: str,
    batches: Batches,
    loss: Loss | None = None,
    *,
    among: Sequence[str] = (),
    bases: Mapping[str, Tensor] | None = None,
    normalize: bool = False,
) -> dict[str, Tensor]:
    """{site path: mean over examples of (dL/dW)^2}, entry by entry, while `adapter` is active.

    Args:
        batches: dicts with labels, cut into single examples (rows of every tensor), since the
            square of a batch's gradient is another thing.
        loss: `loss(model, example) -> scalar`; None takes `model(**example).loss`.
        bases: of `shared_bases`; then squares are taken of U^T dL/dW [p, in], the gradient in the
            coordinates of space "aligned", and merging needs `coordinates="shared"`.
        normalize: divide by the norm over all sites, so that no input counts for its loss's scale.

    Memory: a tensor of W's size a site (p rows with bases). The empirical Fisher: labels as given.
    """
    sites = union_of_sites(model, list(among) or [adapter])
    sums: dict[str, Tensor] = {}
    count = 0
    for example in _examples(batches):
        count += 1
        for path, gradient in gradient_pass(model, sites, [example], loss, active=adapter).items():
            seen = gradient if bases is None else bases[path].to(gradient.dtype).mT @ gradient
            square = seen.square()
            sums[path] = sums[path].add_(square) if path in sums else square
    if not count:
        raise PlaitError("fisher: no examples; give at least one batch.")
    size = 1.0
    if normalize:
        size = float(sum(s.div(count).double().square().sum() for s in sums.values())) ** 0.5 or 1.0
    return {path: total.div_(count * size) for path, total in sums.items()}


def _examples(batches: Batches) -> Iterator[dict[str, Any]]:
    """Batches as single rows; what is not a tensor with a row for each example goes along."""
    for batch in batches:
        tensors = [v for v in batch.values() if isinstance(v, Tensor) and v.dim()]
        rows = len(tensors[0]) if tensors else 0
        for row in range(rows):
            yield {
                key: v[row : row + 1] if isinstance(v, Tensor) and v.dim() and len(v) == rows else v
                for key, v in batch.items()
            }


def _attached(model: nn.Module, names: Sequence[str]) -> list[Adapter]:
    from plait.errors import unknown

    known = adapters(model)
    for name in names:
        if name not in known:
            raise unknown("adapter", name, known)
    return [known[name] for name in names]
