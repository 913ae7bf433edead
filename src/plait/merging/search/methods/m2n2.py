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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.adapter import low_rank_of
from plait.errors import PlaitError
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.found import Found
from plait.merging.search.groups import Grouping
from plait.merging.search.method import Search, SearchMethod
from plait.merging.search.problem import Problem, Score
from plait.merging.search.trials import Trials


@dataclass
class M2n2(Search):
    evaluations: int = 1000
    """Of all examples, the adapters' own included (paper: 50,000 of small networks)."""
    archive: int = 20
    """Members that stay (paper: 20)."""
    alpha: float = 1.0
    """How hard examples are competed for (paper: 1); 0 is a plain genetic algorithm."""
    split: bool = True
    """Children change parents' shares at a random depth (paper: yes)."""
    attraction: bool = True
    """Mates are chosen for what the other lacks (paper: yes)."""
    grouping: Grouping = "layer"
    """What shares a coefficient, and so where a split may fall."""

    wants = "scores"

    def __post_init__(self) -> None:
        if self.archive < 2:
            raise PlaitError("m2n2: an archive of two members at least.")

    def find(self, problem: Problem) -> Found:
        """The archive's member of greatest total score; it starts as the adapters, each alone.

        `found.value` is minus the total score; `found.facts["archive"]` has all members'
        coefficients and `["scores"]` their scores [P, n].
        """
        space = Coefficients(problem.model, problem.names, grouping=self.grouping)
        score, k = problem.scored(), space.shape[0]
        if k < 2 or self.evaluations < k:
            raise PlaitError("m2n2: two adapters, and an evaluation for each at least.")
        gram = inner_products(space)
        draw = torch.Generator().manual_seed(problem.seed)
        facts = {name: getattr(self, name) for name in ("archive", "alpha", "split", "attraction")}
        search = space.described() | facts | {"search": "m2n2", "seed": problem.seed}
        members = [space.alone(i) for i in range(k)]
        trace = problem.log.open(search, self.evaluations, "m2n2")
        with space.searching(), torch.no_grad(), trace as trials:
            scores = torch.stack([_scored(space, score, member, trials) for member in members])
            while len(trials.history) < self.evaluations:
                a, b = _parents(scores, self.alpha, self.attraction, draw)
                w = float(torch.rand((), generator=draw, dtype=torch.float64))
                cut = int(torch.randint(space.shape[1], (), generator=draw)) if self.split else None
                child = crossed(members[a], members[b], w, cut, gram)
                members.append(child)
                scores = torch.cat([scores, _scored(space, score, child, trials)[None]])
                if len(members) > self.archive:
                    worst = int(fitness(scores, self.alpha).argmin())
                    members.pop(worst)
                    scores = torch.cat([scores[:worst], scores[worst + 1 :]])
        best = int(scores.sum(1).argmax())
        kept = {"archive": torch.stack(members), "scores": scores}
        return Found(space, members[best], -float(scores[best].sum()), trials.history, kept)


def inner_products(space: Coefficients) -> Tensor:
    """K [g, k, k]: <dW_i, dW_j> summed over each group's sites (or chunks of them), float64."""
    k, g = space.shape
    found = torch.zeros(g, k, k, dtype=torch.float64)
    with torch.no_grad():
        for path, part in space.parts.items():
            here = [(i, a) for i, a in enumerate(space.adapters) if path in a.deltas]
            lows = [(i, low_rank_of(a.deltas[path], energy=1.0)[0].to("cpu")) for i, a in here]
            for group, piece in part.pieces():
                cut = [
                    (i, low.rows(piece) if part.along == "rows" else low.columns(piece))
                    for i, low in lows
                ]
                for i, one in cut:
                    for j, other in cut:
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
    search=M2n2,
)
