"""RoAd: outputs turned in pairs, against the dense matrix of every variant."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait.methods._pairwise import turn_pairs, turned


def linear(bias=True, dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 12, bias=bias)).to(dtype)
    adapter = plait.attach(model, "road", seed=2, **{"group_size": 4, **options})
    return model, adapter.deltas["0"], adapter


def matrix(delta) -> torch.Tensor:
    """R [out, out], entry by entry from the angles and scales."""
    o, half = delta.options, delta.options.group_size // 2
    R = torch.zeros(12, 12).double()
    theta, alpha = (t.detach().view(-1, o.variant, half) for t in (delta.theta, delta.alpha))
    for group in range(12 // o.group_size):
        for k in range(half):
            first = group * o.group_size + k
            i, j = first, first + half
            t, a = theta[group, :, k], alpha[group, :, k]
            # Which number serves which entry: (1,1), (2,2), (1,2), (2,1).
            p, q, r, s = {1: (0, 0, 0, 0), 2: (0, 1, 0, 1), 4: (0, 1, 2, 3)}[o.variant]
            R[i, i], R[j, j] = a[p] * t[p].cos(), a[q] * t[q].cos()
            R[i, j], R[j, i] = -a[r] * t[r].sin(), a[s] * t[s].sin()
    return R


@pytest.mark.parametrize("variant", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_multiplied_by_R(variant, bias):
    model, delta, adapter = linear(bias, variant=variant)
    tiny.scramble(adapter, 0.7)
    R, layer = matrix(delta), model[0]
    W = layer.weight.detach()
    torch.testing.assert_close((W + delta.dense()).detach(), R @ W)
    x = torch.randn(2, 3, 5).double()
    wanted = F.linear(x, W, layer.bias) @ R.T
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(delta.site.forward(x) + delta(x), wanted)
    if bias:
        torch.testing.assert_close(layer.bias + delta.bias(), R @ layer.bias)


def test_variant_1_is_a_rotation_times_a_number():
    _, delta, adapter = linear()
    tiny.scramble(adapter, 0.7)
    R, a = matrix(delta), delta.alpha.detach().view(-1, 1, 2).expand(-1, 2, -1).flatten()
    torch.testing.assert_close(R @ R.T, torch.diag(a.square()))


def test_the_node_is_its_plain_form_with_its_gradients():
    torch.manual_seed(0)
    y, c, d = torch.randn(2, 3, 8).double(), torch.randn(8).double(), torch.randn(8).double()
    y, c, d = (t.requires_grad_() for t in (y, c, d))
    run = lambda *t: turn_pairs(*t, 4)  # noqa: E731
    torch.testing.assert_close(run(y, c, d), y + c * y + d * turned(y, 4))
    assert torch.autograd.gradcheck(run, (y, c, d))
    # An output that is a transposed view, as some models make them.
    assert torch.autograd.gradcheck(lambda t: run(t.transpose(0, 1), c, d), (y,))


def test_small_angles_survive_float32():
    _, delta, _ = linear(dtype=torch.float32)
    with torch.no_grad():
        delta.theta.fill_(1e-5)
    c, _ = delta.columns()
    torch.testing.assert_close(c, torch.full((12,), -5e-11), atol=0, rtol=1e-4)


def test_it_starts_at_the_base_bit_for_bit():
    model, delta, _ = linear(variant=4)
    x = torch.randn(4, 5).double()
    assert torch.equal(model(x), delta.site.forward(x)) and not delta.dense().any()


def test_counts_and_refusals():
    for variant in (1, 2, 4):
        _, delta, adapter = linear(variant=variant)
        count = adapter.method.count([delta.site], delta.options)
        assert adapter.num_parameters() == count == variant * 12
    with pytest.raises(plait.PlaitError, match="overrides"):
        linear(group_size=8)
    with pytest.raises(plait.PlaitError, match="even"):
        linear(group_size=3)
    with pytest.raises(plait.PlaitError, match="variant"):
        linear(variant=3)


def test_training():
    model = tiny.llama()
    adapter = plait.attach(model, "road", group_size=16, seed=0)
    losses = tiny.losses(model, adapter, lr=3e-2)
    assert losses[-1] < 0.8 * losses[0]
