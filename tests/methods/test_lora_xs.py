"""LoRA-XS: the frozen factors, the trained core, and what backward keeps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny


def linear(rank=3, dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 6)).to(dtype)
    adapter = plait.attach(model, "lora-xs", rank=rank, seed=2, **options)
    return model, adapter.deltas["0"], adapter


@pytest.mark.parametrize("svd", ["randomized", "exact"])
def test_factors_are_the_leading_singular_triplets(svd):
    model, delta, _ = linear(svd=svd)
    U, S, Vh = torch.linalg.svd(model[0].weight.detach())
    torch.testing.assert_close(delta.B @ delta.A, (U[:, :3] * S[:3]) @ Vh[:3])
    torch.testing.assert_close(delta.B.T @ delta.B, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(delta.A @ delta.A.T, torch.diag(S[:3] ** 2))


def test_the_start_is_the_base_to_about_sigma():
    model, delta, _ = linear()
    assert 0 < delta.dense().norm() <= 1e-3 * model[0].weight.norm()
    _, wide, _ = linear(sigma=1.0)
    torch.testing.assert_close(wide.R * 1e-5, delta.R, rtol=1e-5, atol=0)


def test_only_the_core_trains():
    _, _, adapter = linear()
    assert [n for n, _ in adapter.named_parameters()] == ["0.R"]
    assert adapter.num_parameters() == 9
    assert set(adapter.state_dict()) == {"0.A", "0.B", "0.R"}


def test_gradient_of_the_core_is_s_Bt_g_At():
    model, delta, adapter = linear(alpha=5.0)
    tiny.scramble(adapter, 0.5)
    x, g = torch.randn(7, 9, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    model(x).backward(g)
    want = delta.scaling * delta.B.T @ (g.T @ x) @ delta.A.T
    torch.testing.assert_close(delta.R.grad, want)
    torch.testing.assert_close(
        model(x), F.linear(x, model[0].weight + delta.dense(), model[0].bias)
    )


def test_backward_keeps_no_input():
    """The saved tensors hold A x [r, tokens] but nothing of x's size."""
    model, _, _ = linear(dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(torch.randn(100, 9))
    assert max(shape.numel() for shape in kept) <= 3 * 100


def test_a_rank_above_the_shorter_side_is_refused():
    with pytest.raises(plait.PlaitError, match="shorter side"):
        linear(rank=7)


def test_averaging_cores_averages_deltas():
    _, a, _ = linear(sigma=1.0)
    _, b, other = linear(sigma=1.0)
    tiny.scramble(other, 1.0)
    mean = (a.dense() + b.dense()) / 2
    with torch.no_grad():
        a.R.copy_((a.R + b.R) / 2)
    torch.testing.assert_close(a.dense(), mean)


def test_hold_back_starts_at_the_base():
    model, delta, adapter = linear(sigma=1.0)
    delta.hold_back()
    assert delta.dense().abs().max() < 1e-12
    tiny.scramble(adapter, 0.5)
    x = torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(
        model(x), F.linear(x, model[0].weight + delta.dense(), model[0].bias)
    )


def test_counts_and_training():
    model = tiny.llama()
    adapter = plait.attach(model, "lora-xs", rank=8, seed=0)
    sites = [d.site for d in adapter.deltas.values()]
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == 64 * 14
    losses = tiny.losses(model, adapter)
    assert losses[-1] < 0.8 * losses[0]
