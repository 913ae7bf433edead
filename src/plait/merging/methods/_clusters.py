"""K-means on points that are only known by their inner products, with seeded restarts."""

from __future__ import annotations

import torch
from torch import Tensor


def kernel_means(
    gram: Tensor, mass: Tensor, clusters: int, restarts: int, steps: int, seed: int
) -> Tensor:
    """The cluster [n] of each of n points with inner products [n, n] and masses [n].

    The first start takes the points that lie farthest from those taken before, from the longest on;
    the others draw by squared distance (k-means++). The one of least inertia wins. No cluster is
    empty: `clusters` is at most n.
    """
    generator = torch.Generator().manual_seed(seed)
    best, least = torch.zeros(len(gram), dtype=torch.long), torch.inf
    for attempt in range(max(1, restarts)):
        label, inertia = _lloyd(gram, mass, _start(gram, clusters, attempt, generator), steps)
        if inertia < least * (1 - 1e-9):
            best, least = label, inertia
    return best


def centroids(label: Tensor, mass: Tensor, clusters: int) -> Tensor:
    """Each cluster's centroid as shares [clusters, n] of its members, by mass."""
    member = torch.nn.functional.one_hot(label, clusters).mT * mass
    return member / member.sum(1, keepdim=True).clamp_min(1e-300)


def _start(gram: Tensor, clusters: int, attempt: int, generator: torch.Generator) -> Tensor:
    """The cluster [n] of the nearest of the chosen points."""
    square = gram.diagonal()
    apart = (square[:, None] + square - 2 * gram).clamp_min(0)
    first = int(square.argmax())
    if attempt:
        first = int(torch.randint(len(gram), (), generator=generator))
    chosen = [first]
    while len(chosen) < clusters:
        near = apart[:, chosen].amin(1)
        near[chosen] = 0
        if attempt and bool(near.sum() > 0):
            chosen.append(int(torch.multinomial(near, 1, generator=generator)))
        else:
            near[chosen] = -1
            chosen.append(int(near.argmax()))
    label = apart[:, chosen].argmin(1)
    label[chosen] = torch.arange(clusters)
    return label


def _lloyd(gram: Tensor, mass: Tensor, label: Tensor, steps: int) -> tuple[Tensor, float]:
    clusters = int(label.max()) + 1
    for _ in range(steps):
        nearest = _distances(gram, centroids(label, mass, clusters)).argmin(1)
        if len(nearest.unique()) < clusters or bool((nearest == label).all()):
            break
        label = nearest
    found = _distances(gram, centroids(label, mass, clusters))
    return label, float((mass * found.gather(1, label[:, None])[:, 0]).sum())


def _distances(gram: Tensor, shares: Tensor) -> Tensor:
    """Squared distances [n, clusters] of points from centroids."""
    cross = gram @ shares.mT
    own = (shares * cross.mT).sum(1)
    return (gram.diagonal()[:, None] - 2 * cross + own).clamp_min(0)
