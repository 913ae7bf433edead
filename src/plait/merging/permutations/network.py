"""`merge_networks`: two networks of one architecture, of whatever initialisation, into one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from plait.errors import PlaitError
from plait.merging.permutations.budget import budget_ratios, cost, cost_terms
from plait.merging.permutations.finding import find_groups
from plait.merging.permutations.fit import Targets, least_squares
from plait.merging.permutations.groups import Group, tensors_of
from plait.merging.permutations.matching import By, Matching, match
from plait.merging.permutations.moments import joint_moments
from plait.merging.permutations.partial import (
    Split,
    partial_merge,
    refresh_batch_norms,
    split_units,
)


@dataclass(frozen=True)
class MergedNetwork:
    """The merged module, and how it came about."""

    model: nn.Module
    groups: list[Group]
    matching: Matching
    splits: dict[str, Split]
    ratios: dict[str, float]
    cost: float
    """Entries of its weights without the empty blocks, as a multiple of one network's."""


def merge_networks(
    one: nn.Module,
    two: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    groups: Sequence[Group] | None = None,
    by: By | None = None,
    budget: float = 1.0,
    ratios: float | Mapping[str, float] | None = None,
    weights: tuple[float, float] = (0.5, 0.5),
    fit: bool | None = None,
    targets: Targets = "average",
    ridge: float = 1e-4,
    seed: int = 0,
) -> MergedNetwork:
    """PLeaS: match the units of two networks, merge those that are alike, fit what came out.

    Args:
        batches: dicts for `model(**batch)`, without labels, iterated once or twice (give a list).
            Without them units are matched by their weights and nothing is fitted.
        groups: None finds them (see `find_groups`, `chain_groups`).
        by: match by "weights" or "activations"; None takes activations where there are batches.
        budget: what the result may cost, as a multiple of one network: it decides how much of each
            group stays separate (see `budget_ratios`).
        ratios: those shares themselves, instead of a budget.
        weights: of the two networks, not negative, adding up to 1.
        fit: solve the linear layers by least squares; None does where there are batches.
        targets, ridge: of the fit (see `least_squares`).

    Both networks are left as they are. Batch norms take their statistics from the batches.
    Nasery et al., 2024, arXiv 2407.02447.
    """
    for model in (one, two):
        tensors_of(model)  # refuses adapters, before their modules are taken for layers
    found = list(groups) if groups is not None else find_groups(one)
    by = by or ("weights" if batches is None else "activations")
    fit = batches is not None if fit is None else fit
    moments: dict[str, Tensor] = {}
    if fit or by == "activations":
        if batches is None:
            raise PlaitError("matching by activations and the fit need batches=; give a few.")
        moments = joint_moments(one, two, batches)
    matching = match(one, two, found, by, moments, seed=seed)
    if ratios is None:
        ratios = budget_ratios(one, found, budget, matching)
    splits = split_units(found, matching, ratios)
    model = partial_merge(one, two, found, splits, weights)
    if fit:
        model = least_squares(
            *(model, one, two, found, splits, moments),
            weights=weights,
            targets=targets,
            ridge=ridge,
        )
    if batches is not None:
        refresh_batch_norms(model, batches)
    taken = {g.name: len(splits[g.name].alone[0]) / g.size for g in found}
    return MergedNetwork(model, found, matching, splits, taken, cost(cost_terms(one, found), taken))
