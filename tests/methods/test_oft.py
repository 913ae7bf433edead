"""OFT: rotations that are rotations, what they leave alone, and the constrained form."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait.methods._rotations import blockwise, cayley, nearest_divisor, rotate, skew
from plait.methods.oft import OftDelta


def linear(shape=(12, 6), dtype=torch.float64, size=0.4, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(*shape)).to(dtype)
    adapter = plait.attach(model, "oft", seed=2, **{"block_size": 4, "terms": None, **options})
    tiny.scramble(adapter, size)
    return model, adapter.deltas["0"], adapter


def rotation(delta: OftDelta) -> torch.Tensor:
    """R, dense: Cayley's formula block by block, without any of the code under test."""
    size, blocks = delta.size, []
    for q in delta.q.detach():
        Q = q.new_zeros(size, size)
        Q[tuple(torch.triu_indices(size, size, 1))] = q
        Q = Q - Q.T
        eye = torch.eye(size).to(Q)
        blocks.append((eye + Q) @ torch.linalg.inv(eye - Q))
    count = delta.site.in_features // size
    return torch.block_diag(*(blocks if len(blocks) == count else blocks * count))


@pytest.mark.parametrize("share", [False, True])
def test_inputs_times_R_through_W_is_the_rotated_weight(share):
    model, delta, _ = linear(share=share)
    R = rotation(delta)
    torch.testing.assert_close(R @ R.T, torch.eye(12).double())
    W = model[0].weight.detach()
    torch.testing.assert_close(W + delta.dense(), W @ R.T)
    x = torch.randn(2, 5, 12).double()
    torch.testing.assert_close(model(x), F.linear(x @ R, W, model[0].bias))


def test_angles_lengths_and_singular_values_stay():
    model, delta, _ = linear(shape=(12, 20))
    W = model[0].weight.detach()
    moved = W + delta.dense()
    assert (moved - W).norm() > 0.1 * W.norm()
    torch.testing.assert_close(moved @ moved.T, W @ W.T)
    torch.testing.assert_close(torch.linalg.svdvals(moved), torch.linalg.svdvals(W))


@pytest.mark.parametrize("terms", [3, 4, 5, 12])
def test_the_series_is_off_by_a_known_factor(terms):
    Q, eye = 0.1 * skew(torch.randn(3, 28).double(), 8), torch.eye(8).double()
    exact, series = eye + cayley(Q), eye + cayley(Q, terms)
    torch.testing.assert_close(exact, torch.linalg.solve(eye - Q, eye + Q))
    torch.testing.assert_close(series, (eye - torch.linalg.matrix_power(Q, terms - 1)) @ exact)


def test_five_terms_are_orthogonal_enough_for_small_turns():
    Q = skew(torch.randn(3, 28).double(), 8)
    Q = 0.1 * Q / torch.linalg.matrix_norm(Q)[:, None, None]
    R = torch.eye(8) + cayley(Q, 5)
    assert (R @ R.mT - torch.eye(8)).abs().max() < 1e-3


def test_the_series_is_the_sum_that_its_docstring_states():
    Q = skew(torch.randn(2, 6).double(), 4)
    powers = torch.stack([torch.linalg.matrix_power(Q, k) for k in range(1, 5)])
    torch.testing.assert_close(
        cayley(Q, 5), (torch.tensor([2, 2, 2, 1.0])[:, None, None, None] * powers).sum(0)
    )


@pytest.mark.parametrize("blocks", [1, 3, 6])
@pytest.mark.parametrize("run", [rotate, blockwise])
def test_block_products_and_their_gradients_are_the_dense_ones(blocks, run):
    torch.manual_seed(0)
    x, C = torch.randn(2, 5, 24).double(), torch.randn(blocks, 4, 4).double()
    dense = torch.block_diag(*(C if blocks == 6 else C[:1].expand(6, 4, 4)))
    if blocks == 3:
        x, dense = x[..., :12], torch.block_diag(*C)
    x, C = x.clone().requires_grad_(), C.requires_grad_()
    wanted = x.detach() @ dense + (x.detach() if run is rotate else 0)
    torch.testing.assert_close(run(x, C), wanted)
    assert torch.autograd.gradcheck(run, (x, C))
    with plait.kernels.use_reference():
        torch.testing.assert_close(run(x, C), wanted)


def test_half_precision_keeps_small_turns():
    """Rounding R itself would lose the diagonal's share of a small rotation."""
    x, C = torch.ones(1, 4, dtype=torch.bfloat16), torch.diag(torch.full((4,), 2e-3))[None]
    assert torch.equal(blockwise(x, C), torch.full((1, 4), 2e-3).bfloat16())
    assert (1 + C[0, 0, 0]).bfloat16() == 1


def test_constrained_blocks_stay_in_their_ball_while_they_train():
    model, delta, adapter = linear(radius=0.3, size=1.0)
    limit = 0.3 / 3**0.5
    lengths = torch.linalg.matrix_norm(skew(delta._within().detach(), 4))
    assert lengths.max() <= limit * (1 + 1e-6)
    model.train()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 12).double()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(torch.randn(4, 12).double())
    assert torch.linalg.matrix_norm(skew(delta.q.detach(), 4)).max() <= limit * (1 + 1e-6)


def test_a_dropped_block_leaves_its_features_alone():
    model, delta, _ = linear(block_dropout=0.5)
    model.train()
    torch.manual_seed(3)
    seen = {tuple(bool(c.any()) for c in delta.change()) for _ in range(30)}
    assert len(seen) > 3
    model.eval()
    assert all(c.any() for c in delta.change())


def test_block_sizes_are_divisors_and_the_nearest():
    assert [nearest_divisor(48, k) for k in (32, 36, 37, 5, 50)] == [24, 24, 48, 4, 48]
    _, delta, adapter = linear(shape=(12, 6), block_size=5)
    assert delta.q.shape == (3, 6)
    assert adapter.num_parameters() == adapter.method.count([delta.site], delta.options) == 18
    with pytest.raises(plait.PlaitError, match="block_size"):
        linear(shape=(7, 6), block_size=2)
    with pytest.raises(plait.PlaitError, match="terms"):
        linear(terms=2)


def test_nothing_of_the_weights_size_is_kept():
    model, _, _ = linear(shape=(64, 64), dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(3, 64))
    W = model[0].weight
    assert max(t.numel() for t in kept if t.data_ptr() != W.data_ptr()) <= 32 * 64


def test_training():
    model = tiny.llama()
    adapter = plait.attach(model, "oft", block_size=8, seed=0)
    losses = tiny.losses(model, adapter)
    assert losses[-1] < 0.8 * losses[0]


def test_autocast_does_not_loosen_the_rotations():
    for options in ({"terms": None}, {"terms": 6}):
        _, delta, _ = linear(dtype=torch.float32, **options)
        wanted = delta.change()
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(delta.change(), wanted, rtol=0, atol=0)
