"""Streaming reductions of what sites of a frozen model read.

Sites that read the same tensor (q, k and v; gate and up) share one reduction, found by the tensor's
identity on the first batch and checked on every later one: work and memory count once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.adapter.site import ConvSite, LinearSite, Site, first_input
from plait.errors import PlaitError
from plait.statistics.frozen import Active, frozen, to_device
from plait.statistics.progress import track
from plait.statistics.reducers import Reduction

Reducer = Callable[[int], Reduction]
"""Makes the running state for inputs of a given width: `SecondMoment()`, `InputSVD(rank=8)`."""


def activation_pass(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Any]],
    reduce: Reducer,
    *,
    ignore_unlabelled: bool = True,
    share: bool = True,
    active: Active = (),
) -> dict[str, Any]:
    """{path: what `reduce` makes of the site's inputs}, without gradients.

    Args:
        sites: linear or convolution sites (whose inputs are unrolled patches).
        batches: dicts for `model(**batch)`, consumed once, and no further than `reduce` needs.
        reduce: see `Reducer`.
        ignore_unlabelled: leave out tokens whose label is -100, as well as padding.
        share: one reduction for sites that read the same tensor; they get the same result object.
        active: adapters to run with, as `plait.activate` takes them; () is the base model.

    Raises PlaitError for other kinds of sites, or where sites that shared their input on the first
    batch no longer do (pass share=False).
    """
    for site in sites:
        if not isinstance(site, LinearSite | ConvSite):
            raise PlaitError(
                f"activation_pass: site {site.path!r} is a {site.kind}; it takes linear and conv."
            )
    watch = _Watch(reduce, share, ignore_unlabelled)
    with frozen(model, active) as device, torch.no_grad():
        handles = [s.base.register_forward_pre_hook(watch.hook(s), with_kwargs=True) for s in sites]
        try:
            for raw in track(batches, "activations"):
                batch = to_device(raw, device)
                watch.begin(batch)
                # Labels would only make the model compute a loss that nobody reads.
                model(**{k: v for k, v in batch.items() if k != "labels"})
                if watch.done(len(sites)):
                    break
        finally:
            for handle in handles:
                handle.remove()
    return watch.results(sites)


@dataclass(eq=False)
class _Group:
    leader: str
    reduction: Reduction
    unroll: tuple[Any, ...] = ()
    """How the leader cuts its input into rows; sites that cut otherwise do not share."""
    latest: Any = None
    """Weak reference to the input that the leader read last."""


@dataclass(eq=False)
class _Watch:
    reduce: Reducer
    share: bool
    ignore_unlabelled: bool
    groups: dict[str, _Group] = field(default_factory=dict)
    tokens: Tensor | None = None

    def begin(self, batch: Mapping[str, Any]) -> None:
        """A new forward: which tokens count."""
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        self.tokens = mask.bool() if mask is not None and mask.dim() == 2 else None
        if self.ignore_unlabelled and labels is not None and labels.dim() == 2:
            labelled = labels != -100
            same = self.tokens is not None and self.tokens.shape == labelled.shape
            self.tokens = self.tokens & labelled if same else labelled

    def hook(self, site: Site) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = first_input(args, kwargs)
            group = self.groups.get(site.path)
            if group is None:
                group = self.groups[site.path] = self._join(site, x)
            if group.leader != site.path:
                self._check_same(group, site, x)
                return
            group.latest = weakref.ref(x)
            if not group.reduction.done:
                group.reduction.update(_rows(site, x, self.tokens))

        return hook

    def _join(self, site: Site, x: Tensor) -> _Group:
        for group in self.groups.values() if self.share else ():
            if group.latest is not None and group.latest() is x and group.unroll == _unroll(site):
                return group
        return _Group(site.path, self.reduce(site.in_features), _unroll(site))

    def _check_same(self, group: _Group, site: Site, x: Tensor) -> None:
        if group.latest() is not x:
            raise PlaitError(
                f"{site.path!r} and {group.leader!r} read the same input on one batch and not on "
                "another; pass share=False."
            )

    def done(self, count: int) -> bool:
        return len(self.groups) == count and all(g.reduction.done for g in self.groups.values())

    def results(self, sites: Sequence[Site]) -> dict[str, Any]:
        found: dict[int, Any] = {}
        results = {}
        for site in sites:
            group = self.groups.get(site.path) or _Group(site.path, self.reduce(site.in_features))
            if id(group) not in found:
                found[id(group)] = group, group.reduction.result()
            results[site.path] = found[id(group)][1]
        return results


def _unroll(site: Site) -> tuple[Any, ...]:
    if isinstance(site, LinearSite):
        return ()
    m: Any = site.base
    return (m.kernel_size, m.stride, m.padding, m.dilation, m.padding_mode)


def _rows(site: Site, x: Tensor, tokens: Tensor | None) -> Tensor:
    """x as rows [n, in], without the tokens that do not count."""
    if isinstance(site, ConvSite):
        return _patches(site, x)
    flat = x.reshape(-1, x.shape[-1])
    # Experts and the like read a selection of tokens, to which no mask can be matched.
    if tokens is None or tokens.numel() != len(flat):
        return flat
    return flat[tokens.reshape(-1).to(flat.device)]


def _patches(site: Site, x: Tensor) -> Tensor:
    """The patches [n, C k k] that a convolution's kernel sees."""
    m: Any = site.base
    if m.groups != 1:
        raise PlaitError(f"activation_pass: {site.path!r} is a grouped convolution; exclude it.")
    pads = m._reversed_padding_repeated_twice
    padded = F.pad(x, pads) if m.padding_mode == "zeros" else F.pad(x, pads, mode=m.padding_mode)
    for axis, (size, step, gap) in enumerate(zip(m.kernel_size, m.stride, m.dilation, strict=True)):
        # [N, C, ..., positions, ..., taps]: one trailing axis of taps for every spatial axis.
        padded = padded.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    spatial = padded.dim() - 2 - len(m.kernel_size)
    order = [0, *range(2, 2 + spatial), 1, *range(2 + spatial, padded.dim())]
    return padded.permute(order).reshape(-1, site.in_features)
