"""M2N2: evolution of coefficients in which merge boundaries move and specialists survive.

    fitness f_i = sum_j S_ij / z_j^alpha, z_j = sum_i S_ij           an example feeds who solves it
    mate of a   ~ g_b = sum_j max(0, S_bj - S_aj) / z_j^alpha        strong where a is weak
    child       = slerp(a, b; t), t = w before a random split in depth, 1 - w from there on
    the archive takes the child and drops its least fit

A member is its coefficients C [k, groups] on the adapters: children are linear in them, and the
angle between parents comes from the adapters' inner products, <a, b> = sum_l c_a^T K_l c_b. Slerp
is of changes, not of whole models, whose angle is about 0. One evaluation of the data a child.
Paper: Abrantes et al., 2025, arXiv 2508.16204. No mutation (it would leave the adapters' span).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import low_rank_of
from plait.errors import PlaitError
from plait.merging.search.coefficients import Coefficients, Grouping
from plait.merging.search.found import Found
from plait.merging.search.method import SearchMethod
from plait.merging.search.trials import Trials, open_trials

Score = Callable[[nn.Module], Tensor]
"""Of the model with coefficients in use: a number in [0, 1] for each example, without chance."""


def m2n2(
    model: nn.Module,
    names: Sequence[str],
    score: Score,
    *,
    evaluations: int = 1000,
    archive: int = 20,
    alpha: float = 1.0,
    split: bool = True,
    attraction: bool = True,
    grouping: Grouping = "layer",
    seed: int = 0,
    log: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Found:
    """The archive's member of greatest total score; it starts as the adapters, each alone.

    Args:
        evaluations: of the score, the adapters' own included.
        archive: members that stay.
        alpha: how hard examples are competed for; 0 is a plain genetic algorithm.
        split, attraction: switch off the split point and the choice of mates.

    `found.value` is minus the total score; `found.facts["archive"]` has all members' coefficients
    and `["scores"]` their scores [P, n].
    """
    space = Coefficients(model, names, grouping=grouping)
    k = space.shape[0]
    if archive < 2 or k < 2 or evaluations < k:
        raise PlaitError("m2n2: two adapters, an archive of two, an evaluation for each adapter.")
    gram = inner_products(space)
    draw = torch.Generator().manual_seed(seed)
    facts = {"archive": archive, "alpha": alpha, "split": split, "attraction": attraction}
    search = space.described() | facts | {"search": "m2n2", "seed": seed}
    members = [_alone(space, i) for i in range(k)]
    label = "m2n2"
    with (
        space.searching(),
        torch.no_grad(),
        open_trials(log, search, evaluations, label, progress) as trials,
    ):
        scores = torch.stack([_scored(space, score, member, trials) for member in members])
        while len(trials.history) < evaluations:
            a, b = _parents(scores, alpha, attraction, draw)
            w = float(torch.rand((), generator=draw, dtype=torch.float64))
            cut = int(torch.randint(space.shape[1], (), generator=draw)) if split else None
            child = crossed(members[a], members[b], w, cut, gram)
            members.append(child)
            scores = torch.cat([scores, _scored(space, score, child, trials)[None]])
            if len(members) > archive:
                worst = int(fitness(scores, alpha).argmin())
                members.pop(worst)
                scores = torch.cat([scores[:worst], scores[worst + 1 :]])
    best = int(scores.sum(1).argmax())
    kept = {"archive": torch.stack(members), "scores": scores}
    return Found(space, members[best], -float(scores[best].sum()), trials.history, kept)


def inner_products(space: Coefficients) -> Tensor:
    """K [g, k, k]: <dW_i, dW_j> summed over each group's sites, float64."""
    k, g = space.shape
    found = torch.zeros(g, k, k, dtype=torch.float64)
    with torch.no_grad():
        for path, group in space.member.items():
            here = [(i, a) for i, a in enumerate(space.adapters) if path in a.deltas]
            lows = [(i, low_rank_of(a.deltas[path], energy=1.0)[0].to("cpu")) for i, a in here]
            for i, one in lows:
                for j, other in lows:
                    found[group, i, j] += one.inner(other).double()
    return found


def crossed(a: Tensor, b: Tensor, w: float, cut: int | None, gram: Tensor) -> Tensor:
    """The child of coefficients a and b [k, g]: slerp at w before group `cut`, 1 - w from there on.

    One angle for the whole model; parallel parents are interpolated linearly.
    """

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("il,lij,jl->", x, gram, y)

    groups = torch.arange(a.shape[1])
    t = torch.where(groups < (len(groups) if cut is None else cut), w, 1 - w).to(a.dtype)
    lengths = (inner(a, a) * inner(b, b)).clamp_min(0).sqrt()
    cosine = inner(a, b) / lengths if lengths > 0 else torch.ones((), dtype=a.dtype)
    angle = cosine.clamp(-1, 1).arccos()
    if angle.sin() <= 1e-6:
        return (1 - t) * a + t * b
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def fitness(scores: Tensor, alpha: float) -> Tensor:
    """[P]: scores [P, n] as shares of what each example feeds."""
    return _shares(scores, alpha).sum(1)


def _shares(scores: Tensor, alpha: float) -> Tensor:
    eaten = scores.sum(0)
    return scores / torch.where(eaten > 0, eaten, 1.0).pow(alpha)


def _parents(
    scores: Tensor, alpha: float, attraction: bool, draw: torch.Generator
) -> tuple[int, int]:
    shares = _shares(scores, alpha)
    first = _drawn(shares.sum(1), draw)
    gains = (shares - shares[first]).clamp_min(0).sum(1)
    # Where nobody adds anything to a, mates are as fit as they are.
    second = _drawn(gains if attraction and bool(gains.any()) else shares.sum(1), draw)
    return first, second


def _drawn(chances: Tensor, draw: torch.Generator) -> int:
    usable = chances if bool(chances.any()) else torch.ones_like(chances)
    return int(torch.multinomial(usable, 1, generator=draw))


def _alone(space: Coefficients, index: int) -> Tensor:
    member = torch.zeros(space.shape, dtype=torch.float64)
    member[index] = 1.0
    return member


def _scored(space: Coefficients, score: Score, member: Tensor, trials: Trials) -> Tensor:
    def ask() -> dict[str, Any]:
        space.use(member)
        found = score(space.model).detach().to("cpu", torch.float64).flatten()
        if bool(((found < 0) | (found > 1)).any()):
            raise PlaitError("m2n2: scores must lie in [0, 1], one for each example.")
        return {"value": -float(found.sum()), "scores": found.tolist()}

    return torch.tensor(trials(member, ask)["scores"], dtype=torch.float64)


METHOD = SearchMethod(
    name="m2n2",
    title="M2N2: evolving merges with moving boundaries and niches",
    paper="Abrantes et al., 2025, arXiv 2508.16204",
    run=m2n2,
)
