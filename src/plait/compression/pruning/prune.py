"""`prune`: the least important heads and channels taken out of a model, in place.

    structure ──► importance ──► which units stay ──► weights cut ──► sizes fitted ──► checked
    (one run)     (data)         (ratio)              (adapters too)                    (one run)

What comes out is a smaller dense model of the same class. Before anything is believed, its answers
are compared with those of the whole model with the same units switched off.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.compression.pruning.cutting import Pruned, by_all_names, cut, cut_shapes
from plait.compression.pruning.importance import Batches, Importance, make_importance
from plait.compression.pruning.selection import (
    Scope,
    Share,
    kind,
    lowest_of_all,
    lowest_of_each,
    staying,
    unit_price,
)
from plait.compression.pruning.sizes import fitting_configs, shapes_of
from plait.errors import PlaitError, unknown
from plait.rules._prunable import few_rows
from plait.statistics.gradients import Loss
from plait.structure import Group, Masks, Structure, find_structure
from plait.structure.trace import example

Mode = Literal["block", "channel"]


def prune(
    model: nn.Module,
    *,
    ratio: float = 0.2,
    data: Iterable[Mapping[str, Any]] | None = None,
    importance: str | Importance = "taylor",
    mode: Mode = "block",
    scope: Scope = "local",
    steps: int = 1,
    multiple: int = 1,
    skip: Sequence[int] = (),
    keep: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    loadable: bool = True,
) -> Pruned:
    """Take heads and channels out of `model`, in place, and out of its adapters.

    Args:
        ratio: share of each group's units that go (rounded down; one unit always stays); with
            scope "global", share of the groups' parameters.
        data: batches for `model(**batch)`, with labels where the model itself computes a loss. A
            few suffice (the paper: 10 of 64 tokens). Each is one sample of second derivatives.
        importance: "taylor" (LLM-Pruner), "lora" (LoRAPrune's estimate from the active adapter's
            gradients), "magnitude", "random", or an instance with options of its own.
        mode: "block" takes attention heads (a key-value head with its queries) and channels within
            blocks; "channel" the width of what runs through all of them, which norms see, so that
            the rest answers differently.
        scope: "local" takes the same share from every group, "global" the least important for
            their parameters wherever they are.
        steps: times that importance is measured, with what is gone so far switched off.
        multiple: widths stay multiples of this.
        skip: indices of blocks that stay whole (the paper: the first four and the last two).
        keep: {group: units that stay} instead of a ratio, as indices or bools; what the rule
            `lora-prune` leaves in `adapter.info["lora-prune"]["kept"]`.
        loss: `loss(model, batch) -> scalar`; None takes `model(**batch).loss`.
        loadable: leave whole, with a warning, the kinds of groups of a transformers model whose new
            sizes no configuration can say, so that `from_pretrained` loads the result. False takes
            those too, and `load_pruned` loads it.

    Adapters come out as plain LoRAs. Where nothing but whole units is taken out, the smaller model
    answers exactly as the model with those units switched off; that is checked before it is handed
    back. Raises PlaitError, with the model as it was, where no group can be followed, or the
    smaller model does not run.
    """
    if mode not in ("block", "channel"):
        raise unknown("mode", mode, ("block", "channel"))
    share = Share(ratio, scope, steps, multiple)
    batches = list(data or ())
    sample = _sample(model, batches)
    structure = find_structure(model, sample)
    if keep is not None:
        return cut(model, structure, _given(structure, keep), sample)
    groups = _groups(model, structure, mode, skip)
    left_whole = {}
    if loadable and hasattr(type(model), "_from_config"):
        if scope == "global" or skip:
            raise PlaitError(
                "configurations of transformers have one width for all blocks; with scope='global' "
                "or skip= give loadable=False (plait.compression.load_pruned reads the result)."
            )
        left_whole = _what_no_config_says(model, structure, groups, share)
        groups = [group for group in groups if group.name not in left_whole]
    kept = _choose(model, structure, groups, make_importance(importance), batches, loss, share)
    result = cut(model, structure, kept, sample)
    result.left_whole = left_whole
    return result


def _sample(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the model is run on to be followed and compared: two rows, or a few tokens."""
    if not batches:
        return example(model)
    return {key: value for key, value in (few_rows(batches) or {}).items() if key != "labels"}


def _groups(model: nn.Module, structure: Structure, mode: Mode, skip: Sequence[int]) -> list[Group]:
    everything = structure.groups.values()
    whole = [
        g for g in everything if g.separable or (mode == "channel" and g.whole and not g.inner)
    ]
    whole = [g for g in whole if g.inner == (mode == "block")]
    found = [group for group in whole if not group.blocks & set(skip)]
    if not found:
        reasons = Counter(structure.refused.values()).most_common(3)
        why = "; ".join(f"{count} x {reason}" for reason, count in reasons)
        raise PlaitError(
            f"{type(model).__name__} has no group of units for mode {mode!r} that could be taken "
            f"out ({'all its blocks are skipped' if whole else why or 'nothing was followed'})."
        )
    return found


def _given(structure: Structure, keep: Mapping[str, Any]) -> dict[str, Tensor]:
    """What `keep` says, as bools."""
    found = {}
    for name, units in keep.items():
        if name not in structure.groups:
            raise unknown("group", name, structure.groups)
        size, given = structure.groups[name].size, torch.as_tensor(units)
        mask = torch.zeros(size, dtype=torch.bool)
        if given.dtype == torch.bool and len(given) == size:
            mask = given
        elif len(given) and int(given.min()) >= 0 and int(given.max()) < size:
            mask[given.long()] = True
        if not mask.any():
            raise PlaitError(f"keep[{name!r}] must name some of its {size} units, 0 to {size - 1}.")
        found[name] = mask
    return found


def _what_no_config_says(
    model: nn.Module, structure: Structure, groups: Sequence[Group], share: Share
) -> dict[str, str]:
    """{group: why it stays whole} for kinds of which no configuration gives the new size."""
    kinds: dict[object, list[Group]] = {}
    for group in groups:
        kinds.setdefault(kind(group), []).append(group)
    shapes = shapes_of(model)
    found: dict[str, str] = {}
    for members in kinds.values():
        count = staying(members[0].size, share.ratio, share.multiple)
        kept = {g.name: torch.arange(g.size) < count for g in members}
        indices = by_all_names(model, structure.entries(kept, shapes), shapes)
        configs = fitting_configs(model, cut_shapes(shapes, indices))
        if count < members[0].size and next(configs, None) is None:
            why = "no configuration of the model says its new size"
            found |= dict.fromkeys((g.name for g in members), why)
    if len(found) == len(groups):
        raise PlaitError(
            f"no configuration of {type(model).__name__} says any of the new sizes; give "
            "loadable=False (plait.compression.load_pruned reads the result)."
        )
    if found:
        warnings.warn(
            f"{len(found)} groups such as {next(iter(found))!r} stay whole, since no configuration "
            "says their new size; loadable=False takes them too.",
            stacklevel=3,
        )
    return found


def _choose(
    model: nn.Module,
    structure: Structure,
    groups: Sequence[Group],
    importance: Importance,
    data: Batches,
    loss: Loss | None,
    share: Share,
) -> dict[str, Tensor]:
    """{group: which units stay, bool [size]}, in as many steps as `share` says."""
    if importance.needs_data and not data:
        raise PlaitError(f"importance {type(importance).__name__} needs data=, a few batches.")
    shapes = shapes_of(model)
    prices = {group.name: unit_price(group, shapes) for group in groups}
    kept = {group.name: torch.ones(group.size, dtype=torch.bool) for group in groups}
    with Masks(model, structure) as masks:
        for step in range(1, share.steps + 1):
            scores = importance.scores(model, groups, data, loss)
            ratio = share.ratio * step / share.steps
            if share.scope == "local":
                kept = lowest_of_each(groups, scores, kept, ratio, share.multiple)
            else:
                kept = lowest_of_all(groups, scores, kept, ratio, prices)
            masks.set(kept)
    return kept
