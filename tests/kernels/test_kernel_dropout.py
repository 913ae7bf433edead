"""The mask is a function of (shape, p, seed), with independent entries and the promised rate."""

import pytest
import torch

from plait.kernels import dropout_mask, keep_probability, lora_linear
from plait.kernels.dropout import Dropout, row_blocks


@pytest.mark.parametrize("p", [0.05, 0.1, 0.25, 0.5, 0.9])
def test_rate_and_row_variance_are_binomial(p):
    mask = dropout_mask((2000, 500), p, seed=3).double()
    keep = keep_probability(p)
    assert abs(keep - (1 - p)) <= 2**-17
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    n = mask.numel()
    assert abs(mask.mean() - keep) < 5 * (keep * (1 - keep) / n) ** 0.5
    # Row sums of independent entries: variance 500 keep (1 - keep), to a few per cent of 2000 rows.
    spread = mask.sum(1).var() / (500 * keep * (1 - keep))
    assert abs(spread - 1) < 5 * (2 / 2000) ** 0.5


def test_neighbours_are_uncorrelated_at_every_small_lag():
    flat = dropout_mask((400_000,), 0.3, seed=8).double() - keep_probability(0.3)
    variance = 0.3 * 0.7
    for lag in (1, 2, 3, 4, 7, 8, 16, 576, 1024):
        correlation = (flat[lag:] * flat[:-lag]).mean() / variance
        assert abs(correlation) < 5 / flat.numel() ** 0.5, lag


@pytest.mark.parametrize("p", [0.05, 0.25])
def test_same_seed_same_mask_other_seed_other_mask(p):
    first = dropout_mask((40, 30), p, 4)
    assert torch.equal(first, dropout_mask((40, 30), p, 4))
    assert not torch.equal(first, dropout_mask((40, 30), p, 5))


@pytest.mark.parametrize("p", [0.05, 0.25])
@pytest.mark.parametrize("columns", [1, 3, 576])
def test_blocks_concatenate_to_the_whole_mask(p, columns):
    rows = 1003
    stream = Dropout(p, 21).stream(torch.device("cpu"))
    step = 8 * 17
    parts = [stream.next(min(step, rows - start), columns) for start in range(0, rows, step)]
    assert torch.equal(torch.cat(parts), dropout_mask((rows, columns), p, 21))


@pytest.mark.parametrize("shape", [(1024, 576), (7, 1 << 20), (0, 5), (9, 1)])
def test_row_blocks_cover_the_rows_in_multiples_of_eight(shape):
    blocks = row_blocks(*shape)
    assert [r for start, stop in blocks for r in range(start, stop)] == list(range(shape[0]))
    assert all((stop - start) % 8 == 0 for start, stop in blocks[:-1])


def test_global_random_state_is_untouched():
    before = torch.get_rng_state()
    dropout_mask((100, 100), 0.3, 1)
    assert torch.equal(before, torch.get_rng_state())


def test_expectation_of_the_layer_is_the_layer_without_dropout():
    x, W = torch.randn(4, 64).double(), torch.zeros(3, 64).double()
    A, B = torch.randn(5, 64).double(), torch.randn(3, 5).double()
    clean = lora_linear(x, W, None, A, B, 0.5)
    draws = torch.stack(
        [lora_linear(x, W, None, A, B, 0.5, dropout=0.2, seed=s) for s in range(2000)]
    )
    error = (draws.mean(0) - clean).abs()
    assert (error < 5 * draws.std(0) / 2000**0.5).all()
