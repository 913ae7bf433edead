"""ZipLoRA and CAT against dense float64 arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from test_merge_kit import IN, dense, lows, run
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.methods.zip_lora import METHOD


def close(found: LowRank | Tensor, wanted: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(dense(found), wanted, atol=tolerance, rtol=tolerance)


def loss_by_hand(m: Tensor, matrices: list[Tensor], ranks: list[int], overlap: float) -> Tensor:
    merged = sum(x * row for x, row in zip(matrices, m, strict=True))
    total = m.new_zeros(())
    for own, r in zip(matrices, ranks, strict=True):
        V = torch.linalg.svd(own).Vh[:r].mT
        total = total + ((merged - own) @ V).square().sum() / own.square().sum()
    for i in range(len(m)):
        for j in range(i):
            total = total + overlap * (m[i] * m[j]).abs().mean()
    return total


def zip_by_hand(matrices: list[Tensor], ranks: list[int], steps: int, overlap: float) -> Tensor:
    """Nesterov's recursion with autograd's gradients of the dense loss."""
    lengths = sum(x.square().sum(0) for x in matrices).max()
    bound = 2 * lengths * sum(1 / x.square().sum() for x in matrices)
    m = ahead = torch.ones(len(matrices), IN, dtype=torch.float64)
    for t in range(steps):
        at = ahead.clone().requires_grad_()
        gradient = torch.autograd.grad(loss_by_hand(at, matrices, ranks, overlap), at)[0]
        new = ahead - gradient / bound
        ahead, m = new + t / (t + 3) * (new - m), new
    return sum(x * row for x, row in zip(matrices, m, strict=True))


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_zip_lora_goes_down_the_loss_of_dense_matrices(overlap: float) -> None:
    given = lows(3)
    wanted = zip_by_hand([dense(low) for low in given], [3, 2, 4], 25, overlap)
    found = run("zip-lora", "factors", given, [1.0] * 3, steps=25, overlap=overlap)
    close(found, wanted, 1e-7)
    assert found.rank == 9
    start = run("zip-lora", "factors", given, [1.0] * 3, steps=0)
    close(start, sum(map(dense, given)))


def test_each_adapter_s_behaviour_is_kept_better_than_by_the_sum() -> None:
    given = lows(2)
    merged = dense(run("zip-lora", "factors", given, [1.0, 1.0], steps=400, overlap=0.0))
    for low in given:
        own, V = low.dense(), torch.linalg.svd(low.dense()).Vh[: low.rank].mT
        total = sum(map(dense, given))
        before, after = (float(((x - own) @ V).norm() / own.norm()) for x in (total, merged))
        assert after < 0.5 * before


def test_a_dearer_overlap_leaves_less_of_it() -> None:
    shared = []
    for overlap in (0.0, 0.05, 1.0):
        a, b = METHOD.merge(overlap=overlap, steps=200).columns(lows(2), [1.0, 1.0])
        shared.append(float((a * b).abs().mean()))
    assert shared == sorted(shared, reverse=True) and shared[-1] < 0.5 * shared[0]
    with pytest.raises(PlaitError, match="overlap"):
        run("zip-lora", "factors", lows(2), overlap=-1.0)


@pytest.mark.parametrize("space", ["factors", "delta"])
def test_cat_is_a_softmax_over_adapters_at_each_site(space: str) -> None:
    given, logits = lows(3), [0.3, -1.0, 2.0]
    for weights in ([1 / 3] * 3, [0.5, 0.3, 0.2]):
        raw = [w * math.exp(c) for w, c in zip(weights, logits, strict=True)]
        wanted = sum(r / sum(raw) * low.dense() for r, low in zip(raw, given, strict=True))
        close(run("lora-soups-cat", space, given, weights, logits=logits), wanted)
        close(run("lora-soups-cat", space, given, weights, logits={"site": logits}), wanted)
    plain = dense(run("linear", space, given))
    close(run("lora-soups-cat", space, given), plain)
    close(run("lora-soups-cat", space, given, logits={"elsewhere": logits}), plain)
    factors = sum(w * c * dense(low) for w, c, low in zip(weights, logits, given, strict=True))
    close(run("lora-soups-cat", space, given, logits=logits, softmax=False), factors)


def test_one_large_logit_takes_that_adapter_and_a_wrong_number_is_refused() -> None:
    given = lows(3)
    found = run("lora-soups-cat", "factors", given, logits=[0.0, 60.0, 0.0])
    close(found, given[1].dense())
    with pytest.raises(PlaitError, match="2 logits for 3"):
        run("lora-soups-cat", "factors", given, logits=[0.0, 1.0])
