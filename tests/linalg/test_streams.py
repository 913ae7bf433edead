"""Thresholds without sorting, and random numbers by position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.linalg import key_of, kth_magnitude, kth_magnitudes, uniform_at


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 300),
    share=st.floats(0, 1),
    step=st.integers(1, 50),
    kind=st.sampled_from(["normal", "few", "tiny"]),
    seed=st.integers(0, 999),
)
def test_the_threshold_is_that_of_a_sort(size, share, step, kind, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, size, generator=g)
    x = {"normal": x, "few": (2 * x).round(), "tiny": 1e-38 * x}[kind]
    counts = [round(share * size), size, 0]
    found = kth_magnitudes(lambda: x.split(step, 1), counts)
    if counts[0]:
        assert kth_magnitude(x[0], counts[0]) == found[0]
    ordered = x.abs().sort(1, descending=True).values
    for i, count in enumerate(counts):
        assert found[i] == (ordered[i, count - 1] if count else torch.inf)


def test_counts_beyond_the_tensor_are_an_error() -> None:
    with pytest.raises(ValueError, match="entries"):
        kth_magnitudes(lambda: [torch.ones(1, 4)], [5])


def test_numbers_do_not_depend_on_the_blocks_that_ask() -> None:
    key = key_of(3, "layers.0", 1)
    whole = uniform_at(key, range(40), 7)
    parts = torch.cat([uniform_at(key, range(s, min(s + 9, 40)), 7) for s in range(0, 40, 9)])
    assert torch.equal(whole, parts)
    assert torch.equal(whole[::3], uniform_at(key, range(0, 40, 3), 7))
    assert not torch.equal(whole, uniform_at(key_of(3, "layers.1", 1), range(40), 7))


def test_numbers_are_uniform_and_uncorrelated() -> None:
    x = uniform_at(key_of(0, "a"), range(500), 400).double()
    assert x.min() >= 0 and x.max() < 1
    counts = torch.histc(x, 20, 0, 1)
    expected = x.numel() / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 45  # chi-square, 19 degrees
    other = uniform_at(key_of(0, "b"), range(500), 400).double()
    shifted = torch.stack([x[:, :-1].flatten(), x[:, 1:].flatten(), other[:, 1:].flatten()])
    assert torch.corrcoef(shifted).fill_diagonal_(0).abs().max() < 0.01
    down = torch.stack([x[:-1].flatten(), x[1:].flatten()])
    assert torch.corrcoef(down)[0, 1].abs() < 0.01
