"""The second step of PLeaS: every merged layer solved anew, to do on data what both layers did.

    min over W of  |X W^T - Y|^2        X [tokens, in] and Y [tokens, out] in the merged order:
                                        means of merged units | first's own | second's own

Blocks between the two networks' own units stay 0, so there are three systems a layer: for merged
rows on all columns, for either network's own rows on merged and its own columns. Both sides follow
from the joint moments of what the layer's two originals read. A ridge draws towards the block
average, so the fit is never worse than that on the data it sees.
Nasery et al., 2024, arXiv 2407.02447, whose release takes 400 steps of Adam with masked gradients;
the closed form is where they lead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from plait.adapter.site import Site, make_site
from plait.errors import PlaitError, unknown
from plait.merging.permutations.groups import Group, entries, owners, rebuilt
from plait.merging.permutations.partial import Split, check_shares

Targets = Literal["average", "separate"]


@dataclass(frozen=True)
class System:
    """One layer's normal equations: theta [out, in + 1] (the last column the bias, if it has one)
    with least mean |Z theta^T - Y|^2; N = mean Z^T Z and R = mean Z^T Y."""

    N: Tensor
    R: Tensor
    start: Tensor
    """The block average, theta of the merged network."""
    blocks: tuple[tuple[Tensor, Tensor], ...]
    """(rows, columns that they may read)."""


def least_squares(
    merged: nn.Module,
    one: nn.Module,
    two: nn.Module,
    groups: Sequence[Group],
    splits: Mapping[str, Split],
    moments: Mapping[str, Tensor],
    *,
    weights: tuple[float, float] = (0.5, 0.5),
    targets: Targets = "average",
    ridge: float = 1e-4,
) -> nn.Module:
    """A copy of `merged` (of `partial_merge`) whose linear layers with moments are solved anew.

    Args:
        moments: of `joint_moments`; layers that it lacks stay as they are.
        weights: those of `partial_merge`.
        targets: "average" fits the mean of both networks' outputs on the mean of their inputs
            (paper); "separate" fits each network's outputs on its own inputs, with 0 for the units
            that only the other has.
        ridge: towards the block average, a share of the mean of N's diagonal; greater than 0.
    """
    check_shares(weights)
    if targets not in get_args(Targets):
        raise unknown("targets", targets, get_args(Targets))
    if ridge <= 0:
        raise PlaitError(f"least_squares: ridge must be greater than 0, not {ridge}.")
    values: dict[str, Tensor] = {}
    for path, M in moments.items():
        sites = tuple(_site(model, path) for model in (merged, one, two))
        axes = _axes(path, sites[1], groups, splits)
        theta = solve(layer_system(sites, axes, M, weights, targets), ridge)
        width = sites[0].shape[1]
        values[f"{path}.weight"] = sites[0].replacement(theta[:, :width])
        if theta.shape[1] > width:
            values[f"{path}.bias"] = theta[:, width]
    return rebuilt(merged, values)


def solve(system: System, ridge: float) -> Tensor:
    """theta [out, in + 1]; entries outside the blocks are 0."""
    theta = torch.zeros_like(system.start)
    for rows, columns in system.blocks:
        if not len(rows) or not len(columns):
            continue
        N = system.N[columns][:, columns]
        start = system.start[rows][:, columns]
        level = N.diagonal().mean()
        pad = ridge * level if level > 0 else torch.ones_like(level)
        missed = system.R[columns][:, rows] - N @ start.mT
        N = N + pad * torch.eye(len(N), dtype=N.dtype)
        step = torch.linalg.solve(N, missed).mT
        theta[rows[:, None], columns] = start + step
    return theta


@dataclass(frozen=True)
class Axis:
    """The outputs or the inputs of a layer: each network's entries and their places in the merged
    order, of which the first `merged` are both networks'."""

    entries: tuple[Tensor, Tensor]
    places: tuple[Tensor, Tensor]
    merged: int
    width: int

    @classmethod
    def of(cls, split: Split | None, span: int, length: int) -> Axis:
        """Without a split everything is merged as it stands."""
        if split is None:
            all_ = torch.arange(length)
            return cls((all_, all_), (all_, all_), length, length)
        sources = (entries(split.sources(0), span), entries(split.sources(1), span))
        places = (entries(split.places(0), span), entries(split.places(1), span))
        return cls(sources, places, len(split.pairs) * span, split.width * span)


def _site(model: nn.Module, path: str) -> Site:
    site = make_site(path, model.get_submodule(path))
    assert site is not None
    return site


def _axes(
    path: str, site: Site, groups: Sequence[Group], splits: Mapping[str, Split]
) -> tuple[Axis, Axis]:
    """The layer's outputs and inputs."""
    found = {False: Axis.of(None, 1, site.shape[0]), True: Axis.of(None, 1, site.shape[1])}
    for group, slot in owners(groups).get(f"{path}.weight", {}).values():
        found[slot.reads] = Axis.of(splits[group.name], slot.span, 0)
    return found[False], found[True]


def layer_system(
    sites: Sequence[Site],
    axes: tuple[Axis, Axis],
    M: Tensor,
    weights: tuple[float, float],
    targets: Targets,
) -> System:
    """The system of one layer; `sites` are those of the merged network, the first and the second.

    Everything is a linear map of z = [x_1 | x_2 | 1], whose moments M are: P of either network to
    its part of the merged inputs, Q to its part of the targets.
    """
    outputs, inputs = axes
    biased = sites[0].bias() is not None
    maps = [
        (_inputs(inputs, side, len(M), biased), _targets(outputs, side, sites[1 + side], len(M)))
        for side in (0, 1)
    ]
    if targets == "average":
        shares = [(_shares(inputs, w, biased), _shares(outputs, w, False)) for w in weights]
        P, Q = (
            torch.stack([m[i] * s[i] for m, s in zip(maps, shares, strict=True)]).sum(0)
            for i in (0, 1)
        )
        terms = [(P, Q, 1.0)]
    else:
        terms = [(P, Q, w) for (P, Q), w in zip(maps, weights, strict=True)]
    N = torch.stack([w * (P.mT @ M @ P) for P, _, w in terms]).sum(0)
    R = torch.stack([w * (P.mT @ M @ Q) for P, Q, w in terms]).sum(0)
    return System(N, R, _theta(sites[0]), _blocks(outputs, inputs, biased))


def _inputs(axis: Axis, side: int, size: int, biased: bool) -> Tensor:
    P = torch.zeros(size, axis.width + biased, dtype=torch.float64)
    P[axis.entries[side] + side * (size // 2), axis.places[side]] = 1.0
    if biased:
        P[-1, -1] = 1.0
    return P


def _targets(axis: Axis, side: int, site: Site, size: int) -> Tensor:
    Q = torch.zeros(size, axis.width, dtype=torch.float64)
    theta, d = _theta(site)[axis.entries[side]], size // 2
    Q[side * d : (side + 1) * d, axis.places[side]] = theta[:, :d].mT
    if theta.shape[1] > d:
        Q[-1, axis.places[side]] = theta[:, d]
    return Q


def _shares(axis: Axis, weight: float, biased: bool) -> Tensor:
    """A network's share [width] in each column: its weight where both networks are in it."""
    shares = torch.ones(axis.width + biased, dtype=torch.float64)
    shares[: axis.merged] = weight
    if biased:
        shares[-1] = weight
    return shares


def _theta(site: Site) -> Tensor:
    """[out, in], or [out, in + 1] with the bias behind."""
    W, bias = site.weight().detach().to("cpu", torch.float64), site.bias()
    if bias is None:
        return W
    return torch.cat([W, bias.detach().to("cpu", torch.float64)[:, None]], 1)


def _blocks(outputs: Axis, inputs: Axis, biased: bool) -> tuple[tuple[Tensor, Tensor], ...]:
    """Merged rows read everything; a network's own rows the merged columns and its own."""
    last = torch.full((int(biased),), inputs.width)
    found = [(torch.arange(outputs.merged), torch.cat([torch.arange(inputs.width), last]))]
    for side in (0, 1):
        own = outputs.places[side][outputs.merged :]
        found.append((own, torch.cat([inputs.places[side], last])))
    return tuple(found)
