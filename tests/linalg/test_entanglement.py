"""Entropy profiles against singular values of the reshaped matrix, and known states."""

import math

import pytest
import torch

from plait.linalg import LowRank
from plait.linalg.entanglement import cut_entropy, entropy_profile, page_entropy, prime_factors


def by_definition(M, dims):
    """S of every cut, by a full SVD of every reshaping."""
    psi = M.double().flatten() / M.double().norm()
    profile = []
    for c in range(1, len(dims)):
        p = torch.linalg.svdvals(psi.view(math.prod(dims[:c]), -1)).square()
        p = p[p > 1e-14]
        profile.append(-(p * p.log()).sum())
    return torch.stack(profile)


@pytest.mark.parametrize("shape", [(8, 16), (12, 10), (7, 9), (1, 6)])
def test_profile_of_a_matrix(shape):
    M = torch.randn(shape)
    dims = [d for size in shape for d in prime_factors(size)]
    torch.testing.assert_close(entropy_profile(M), by_definition(M, dims), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_profile_of_factors_is_that_of_the_product(rank):
    low = LowRank(B=torch.randn(16, rank), A=torch.randn(rank, 12), scale=0.3)
    got = entropy_profile(low, (4, 4), (3, 2, 2))
    wanted = by_definition(low.dense(torch.float64), (4, 4, 3, 2, 2))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert float(got[1]) <= math.log(min(rank, 12)) + 1e-9


def test_a_product_state_has_no_entropy():
    parts = [torch.randn(2) for _ in range(6)]
    vector = parts[0]
    for part in parts[1:]:
        vector = torch.kron(vector, part)
    assert entropy_profile(vector.view(8, 8)).abs().max() < 1e-9


def test_equal_singular_values_give_the_log_of_their_number():
    Q = torch.linalg.qr(torch.randn(16, 5, dtype=torch.float64)).Q
    R = torch.linalg.qr(torch.randn(32, 5, dtype=torch.float64)).Q
    assert float(entropy_profile(Q @ R.t())[3]) == pytest.approx(math.log(5))
    assert float(cut_entropy(Q @ R.t()).exp()) == pytest.approx(5)


def test_lora_has_a_valley_and_a_full_matrix_has_none():
    M = torch.randn(64, 4, dtype=torch.float64) @ torch.randn(4, 64, dtype=torch.float64)
    low = entropy_profile(M)
    assert low[5] <= math.log(4) and low[5] < low[4] - 0.3 and low[5] < low[6] - 0.3
    full = entropy_profile(torch.randn(64, 64))
    assert torch.all(full.diff()[:5] > 0) and torch.all(full.diff()[5:] < 0)  # up, then down
    assert float(full[5]) == pytest.approx(page_entropy(64, 64), abs=0.05)


def test_scale_and_rotations_of_one_side_do_not_matter():
    M = torch.randn(8, 8, dtype=torch.float64)
    profile = entropy_profile(M)
    for factor in (1e-30, -1e30):
        torch.testing.assert_close(entropy_profile(factor * M), profile)
    Q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    torch.testing.assert_close(entropy_profile(Q @ M)[2:], profile[2:])
    assert not torch.allclose(entropy_profile(Q @ M)[:2], profile[:2])


def test_attention_maps_come_in_batches():
    maps = torch.softmax(torch.randn(3, 6, 6, dtype=torch.float64), -1)
    wanted = torch.stack([by_definition(m, (6, 6))[0] for m in maps])
    torch.testing.assert_close(cut_entropy(maps), wanted)


def test_a_zero_update_has_zeros():
    assert torch.equal(entropy_profile(torch.zeros(4, 4)), torch.zeros(3, dtype=torch.float64))


def test_page_entropy_is_the_mean_over_random_states():
    wanted = sum(1 / k for k in range(7, 25)) - 3 / 12
    assert page_entropy(4, 6) == page_entropy(6, 4) == pytest.approx(wanted)
    complex_states = torch.randn(4000, 4, 6, dtype=torch.complex128)
    p = torch.linalg.svdvals(complex_states).square()
    p = p / p.sum(-1, keepdim=True)
    assert float(torch.special.entr(p).sum(-1).mean()) == pytest.approx(wanted, abs=0.01)
    assert page_entropy(512, 512) == pytest.approx(math.log(512) - 0.5, abs=1e-3)


def test_what_does_not_fit_is_refused():
    M = torch.randn(6, 4)
    for arguments in [(M, (2, 2)), (M, None, (8,)), (M[0],), (M / 0,)]:
        with pytest.raises(ValueError):
            entropy_profile(*arguments)
    with pytest.raises(ValueError):
        page_entropy(0, 3)
