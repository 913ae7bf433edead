"""TSV-Merge, Iso-C and Iso-CTS against dense float64 singular value decompositions."""

from __future__ import annotations

import pytest
import torch
from test_merge_kit import IN, OUT, dense, lows, run
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.methods._spectral import orthonormal
from plait.merging.methods.tsv import METHOD
from plait.merging.spaces import merge_site

THIRDS = [1 / 3] * 3


def polar(X: Tensor) -> Tensor:
    P, _, Qh = torch.linalg.svd(X, full_matrices=False)
    return P @ Qh


def tsv_by_hand(matrices: list[Tensor], ranks: list[int], weights: list[float]) -> Tensor:
    parts = []
    for m, r, w in zip(matrices, ranks, weights, strict=True):
        U, S, Vh = torch.linalg.svd(m, full_matrices=False)
        parts.append((U[:, :r], w * S[:r], Vh[:r].mT))
    U, V = (polar(torch.cat([p[i] for p in parts], 1)) for i in (0, 2))
    return U @ torch.diag(torch.cat([p[1] for p in parts])) @ V.mT


def close(found: LowRank | Tensor, wanted: Tensor, tolerance: float = 1e-8) -> None:
    assert float((dense(found) - wanted).norm() / wanted.norm()) < tolerance


def orthogonal_inputs() -> list[LowRank]:
    g = torch.Generator().manual_seed(5)
    U = torch.linalg.qr(torch.randn(OUT, 9, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(IN, 9, generator=g, dtype=torch.float64)).Q
    return [LowRank(U[:, i : i + 3] * (1.0 + i), V[:, i : i + 3].mT) for i in (0, 3, 6)]


@pytest.mark.parametrize("weights", [THIRDS, [0.5, 0.3, 0.2], [1.0, -0.4, 0.1]])
def test_tsv_is_the_paper_s_on_the_triplets_that_are_there(weights: list[float]) -> None:
    given = lows(3)
    matrices = [low.dense() for low in given]
    wanted = tsv_by_hand(matrices, [3, 2, 4], [3 * w for w in weights])
    for space in ("factors", "delta"):
        close(run("tsv", space, given, weights, damping=0.0), wanted)
    close(run("tsv", "factors", given, weights), wanted, 1e-3)


def test_tsv_of_full_matrices_is_the_dense_one() -> None:
    g = torch.Generator().manual_seed(1)
    full = [torch.randn(12, 15, generator=g, dtype=torch.float64) for _ in range(3)]
    site = Changes("s", dense=full)
    found = merge_site(METHOD.merge(damping=0.0), site, THIRDS, "delta")
    close(found, tsv_by_hand(full, [4, 4, 4], [1.0] * 3))
    rows = [torch.randn(1, 15, generator=g, dtype=torch.float64) for _ in range(3)]
    found = merge_site(METHOD.merge(), Changes("s", dense=rows), THIRDS, "delta")
    close(found, sum(rows) / 3)


def test_tsv_adds_up_what_is_orthogonal_and_not_what_is_alike() -> None:
    given = orthogonal_inputs()
    close(run("tsv", "factors", given, THIRDS), sum(low.dense() for low in given), 2e-6)
    low = lows(1)[0]
    near = [low, low + lows(2)[1] * 1e-5, low]
    for damping in (1e-3, 1e-2):
        found = run("tsv", "factors", near, THIRDS, damping=damping)
        close(found, low.dense(), 1e-3)


def test_one_input_alone_is_cut_to_what_is_kept() -> None:
    low = lows(1)[0]
    close(run("tsv", "factors", [low], [1.0], damping=0.0), low.dense(), 1e-10)
    U, S, Vh = torch.linalg.svd(low.dense())
    close(run("tsv", "factors", [low], [1.0], kept=2, damping=0.0), U[:, :2] * S[:2] @ Vh[:2])


def test_frames_become_orthonormal_and_repeats_share_a_direction() -> None:
    g = torch.Generator().manual_seed(0)
    frame = torch.nn.functional.normalize(torch.randn(20, 6, generator=g).double(), dim=0)
    found = orthonormal(frame, 0.0)
    torch.testing.assert_close(found.mT @ found, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(found, polar(frame))
    twice = orthonormal(torch.cat([frame, frame], 1), 0.0)
    torch.testing.assert_close(twice[:, :6], polar(frame) / 2**0.5)


def test_an_input_whose_factors_are_of_lower_rank_brings_no_fillers() -> None:
    low, other = lows(2)
    padded = LowRank(
        torch.cat([low.B, low.B[:, :1]], 1), torch.cat([low.A, 0 * low.A[:1]]), low.scale
    )
    for method in ("tsv", "iso-c", "iso-cts"):
        wanted = dense(run(method, "factors", [low, other]))
        close(run(method, "factors", [padded, other]), wanted)


@pytest.mark.parametrize("flatten", [1.0, 0.3])
def test_iso_c_flattens_the_sum_s_spectrum(flatten: float) -> None:
    given = lows(3)
    total = sum(w * low.dense() for w, low in zip((0.5, 0.3, 0.2), given, strict=True))
    U, S, Vh = torch.linalg.svd(total)
    U, S, Vh = U[:, :9], S[:9], Vh[:9]
    even = (1 - flatten) * S + flatten * S.mean()
    found = run("iso-c", "factors", given, flatten=flatten, scale=1.5)
    close(found, 1.5 * (U * even) @ Vh)
    if flatten == 1:
        values = torch.linalg.svdvals(dense(found))[:9]
        torch.testing.assert_close(values, torch.full_like(values, 1.5 * float(S.mean())))
        assert float(dense(found).norm()) == pytest.approx(1.5 * 3 * float(S.mean()))


def iso_cts_by_hand(matrices: list[Tensor], common: float, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(sum(matrices), full_matrices=False)
    s = int(common * rank + 1e-9)
    own = (rank - s) // len(matrices)
    lefts, values, rights = [U[:, :s]], [S[:s]], [Vh[:s].mT]
    for m in matrices:
        u, d, vh = torch.linalg.svd(m - U[:, :s] @ U[:, :s].mT @ m, full_matrices=False)
        n = min(own, int((d > 1e-9).sum()))  # a change may have fewer directions than its share
        lefts, values, rights = [*lefts, u[:, :n]], [*values, d[:n]], [*rights, vh[:n].mT]
    return torch.cat(values).mean() * polar(torch.cat(lefts, 1)) @ polar(torch.cat(rights, 1)).mT


@pytest.mark.parametrize("common", [0.0, 0.34, 0.7, 1.0])
def test_iso_cts_is_the_dense_one(common: float) -> None:
    given = lows(3)
    matrices = [w * low.dense() for w, low in zip((0.5, 0.3, 0.2), given, strict=True)]
    wanted = iso_cts_by_hand(matrices, common, 9)
    for space in ("factors", "delta"):
        close(run("iso-cts", space, given, common=common, damping=0.0), wanted, 1e-7)
    values = torch.linalg.svdvals(wanted)
    there = values[values > 1e-9]
    torch.testing.assert_close(there, there[:1].expand_as(there))
    if common == 1:
        close(run("iso-c", "factors", given), wanted)


def test_shares_out_of_range_are_refused() -> None:
    for name, options in (
        ("tsv", {"kept": 0}),
        ("iso-c", {"flatten": 2.0}),
        ("iso-cts", {"common": -0.1}),
    ):
        with pytest.raises(PlaitError, match=name):
            run(name, "factors", lows(2), **options)
