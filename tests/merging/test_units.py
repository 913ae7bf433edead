"""LoRA-LEGO and K-LoRA against the papers' formulas on dense float64 matrices."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_merge_kit import IN, OUT, dense, lows, run
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.methods._clusters import centroids, kernel_means


def close(found: LowRank | Tensor, wanted: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(dense(found), wanted, atol=tolerance, rtol=tolerance)


def inertia(points: Tensor, label: Tensor) -> float:
    return sum(
        float((points[label == c] - points[label == c].mean(0)).square().sum())
        for c in label.unique()
    )


def test_k_means_on_inner_products_finds_the_best_partition_of_a_small_set() -> None:
    points = torch.randn(8, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    label = kernel_means(points @ points.mT, torch.ones(8).double(), 3, 20, 50, seed=0)
    partitions = itertools.product(range(3), repeat=8)
    best = min(
        inertia(points, torch.tensor(p)) for p in partitions if len(set(p)) == 3 and p[0] == 0
    )
    assert inertia(points, label) == pytest.approx(best, rel=1e-9)
    shares = centroids(label, torch.ones(8).double(), 3)
    for c in range(3):
        torch.testing.assert_close((shares @ points)[c], points[label == c].mean(0))


def test_as_many_clusters_as_units_are_the_plain_sum() -> None:
    given = lows(3)
    options = {"clusters": 9, "rescale": False, "restarts": 2}
    close(run("lora-lego", "factors", given, [1 / 3] * 3, **options), sum(map(dense, given)))
    weighted = sum(3 * w * low.dense() for w, low in zip((0.5, -0.3, 0.2), given, strict=True))
    close(run("lora-lego", "factors", given, [0.5, -0.3, 0.2], **options), weighted)


def test_shared_components_become_one_and_the_others_stay() -> None:
    g = torch.Generator().manual_seed(4)
    U = torch.linalg.qr(torch.randn(OUT, 4, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(IN, 4, generator=g, dtype=torch.float64)).Q
    shared = 5.0 * U[:, :1] @ V[:, :1].mT
    own = [s * U[:, i : i + 1] @ V[:, i : i + 1].mT for i, s in ((1, 3.0), (2, 2.0), (3, 1.0))]
    given = []
    for i, part in enumerate(own):
        left, S, right = torch.linalg.svd(shared + part)
        flip = (-1.0) ** i  # (-B, -A) is the same change
        given.append(LowRank(flip * left[:, :2] * S[:2], flip * right[:2]))
    found = run("lora-lego", "factors", given, [1 / 3] * 3, clusters=4, rescale=False)
    close(found, shared + sum(own))
    scaled = run("lora-lego", "factors", given, [1 / 3] * 3, clusters=4)
    close(scaled, (shared + sum(own)) * 0.5**0.5)


def test_centroids_get_their_members_length_back() -> None:
    a = torch.zeros(6, 1, dtype=torch.float64)
    b = a.clone()
    a[0], b[0], b[1] = 1.0, 0.6, 0.8
    e = torch.eye(6, dtype=torch.float64)[:1]
    given = [LowRank(a, e), LowRank(b, e)]
    middle, half = (a + b) / 2, [0.5, 0.5]
    plain = dense(run("lora-lego", "factors", given, half, reweight=False))
    close(plain, middle @ e)
    centroid = torch.cat([middle, e.mT])
    ratio = 2**0.5 / float(centroid.norm())  # units [u ; v] of length sqrt 2
    close(run("lora-lego", "factors", given, half), ratio**2 * middle @ e)


def test_one_adapter_alone_is_compressed_and_the_rank_is_what_was_asked_for() -> None:
    low = lows(3)[2]
    for clusters in (1, 2, 4, 99):
        found = run("lora-lego", "factors", [low], [1.0], clusters=clusters)
        assert found.rank == min(clusters, 4)
    close(run("lora-lego", "factors", [low], [1.0]), low.dense())
    with pytest.raises(PlaitError, match="clusters"):
        run("lora-lego", "factors", [low], [1.0], clusters=0)


def chosen(one: Tensor, two: Tensor, count: int, factor: float) -> Tensor:
    tops = [m.abs().flatten().sort(descending=True).values[:count].sum() for m in (one, two)]
    first = tops[0] / one.abs().sum() > factor * tops[1] / two.abs().sum()
    return one if first else two


@pytest.mark.parametrize("space", ["factors", "delta"])
def test_k_lora_takes_one_adapter_whole_the_later_the_more_the_style(space: str) -> None:
    one, two = lows(2)
    taken = []
    for step in range(11):
        for block in (1, 1 << 20):
            found = dense(
                run("k-lora", space, [one, two], [1.0, 1.0], block=block, moment=step / 10)
            )
            wanted = chosen(one.dense(), two.dense(), 6, 1.5 * step / 10 + 0.5)
            close(found, 2 * wanted)
        taken.append(bool((wanted == one.dense()).all()))
    assert taken[0] and not taken[-1] and taken == sorted(taken, reverse=True)


def test_k_lora_does_not_mind_scales_and_turns_round_with_its_roles() -> None:
    one, two = lows(2)
    for moment in (0.0, 0.25, 0.5, 1.0):
        a = dense(run("k-lora", "factors", [one, two], [0.5, 0.5], moment=moment))
        b = dense(run("k-lora", "factors", [one * 7.0, two], [0.5, 0.5], moment=moment))
        close(b, a * 7 if torch.allclose(a, one.dense()) else a)
    at_one = {"alpha": 0.0, "beta": 1.0}
    a = dense(run("k-lora", "factors", [one, two], [0.5, 0.5], **at_one))
    b = dense(run("k-lora", "factors", [two, one], [0.5, 0.5], **at_one))
    close(a, b)  # at equal terms the same one wins from either side
    with pytest.raises(PlaitError, match="moment"):
        run("k-lora", "factors", [one, two], moment=2.0)
