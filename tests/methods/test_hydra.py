"""Hydra against the two-branch formula in float64, folded and unfolded."""

import pytest
import torch
from torch import nn

import plait
from plait.errors import PlaitError
from tiny_llama import assert_loss_falls

BRANCHES = ["both", "parallel", "sequential"]


def make(bias_of_base=True, dtype=torch.float32, **options):
    model = nn.Sequential(nn.Linear(12, 10, bias=bias_of_base)).to(dtype)
    adapter = plait.attach(model, "hydra", **{"rank": 3, **options})
    return model, adapter.deltas["0"]


def perturb(delta, size=0.3):
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(size * torch.randn_like(p))


def oracle(delta, x):
    """The adapted output, branch by branch as the paper draws it, in float64."""
    site, s = delta.site, delta.options.scale
    p = {n: t.detach().double() for n, t in delta.named_parameters()}
    f = site.forward(x).detach().double()
    y = f.clone()
    for b, seen in (("p", x.double()), ("s", f)):
        if f"A_{b}" in p:
            hidden = seen @ p[f"A_{b}"].t() + p.get(f"a_{b}", 0.0)
            y += s * (hidden @ p[f"B_{b}"].t() + p.get(f"c_{b}", 0.0))
    return y


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bias_of_base", [True, False])
def test_forward_and_folded_weights_equal_the_two_branches(branches, bias, bias_of_base):
    model, delta = make(bias_of_base, branches=branches, bias=bias, scale=0.7)
    perturb(delta)
    x = torch.randn(2, 5, 12)
    wanted = oracle(delta, x)
    torch.testing.assert_close(model(x).double(), wanted, rtol=1e-5, atol=1e-5)
    plait.fuse(model)
    torch.testing.assert_close(model(x).double(), wanted, rtol=1e-5, atol=1e-5)
    plait.unfuse(model)
    assert (model[0].bias is not None) == bias_of_base
    torch.testing.assert_close(model(x).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("start", ["xavier", "normal", "kaiming"])
def test_start_is_the_base_in_bits(branches, start):
    model, delta = make(branches=branches, start=start)
    x = torch.randn(4, 12)
    assert torch.equal(model(x), delta.site.forward(x))
    assert all(p.abs().sum() > 0 for n, p in delta.named_parameters() if n.startswith("A"))


def test_xavier_start_has_its_bound():
    _, delta = make()
    bound = (6 / (12 + 3)) ** 0.5
    assert 0.7 * bound < delta.A_p.abs().max() <= bound


def test_sequential_change_stays_in_the_row_space_of_W_and_the_column_space_of_B():
    model = nn.Sequential(nn.Linear(12, 5))  # W has a row space of dimension 5
    delta = plait.attach(model, "hydra", rank=2, branches="sequential").deltas["0"]
    perturb(delta)
    dW, W = delta.dense().double(), delta.site.weight().detach().double()
    rows = torch.linalg.pinv(W) @ W
    columns = delta.B_s.double() @ torch.linalg.pinv(delta.B_s.double())
    torch.testing.assert_close(dW @ rows, dW, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(columns @ dW, dW, rtol=1e-4, atol=1e-5)


def test_parallel_alone_without_bias_is_lora():
    model, delta = make(branches="parallel", bias=False)
    perturb(delta)
    lora_model = nn.Sequential(nn.Linear(12, 10))
    lora_model.load_state_dict(model.state_dict(), strict=False)
    lora = plait.attach(lora_model, "lora", rank=3, alpha=3).deltas["0"]
    lora.set_pair(delta.A_p.detach(), delta.B_p.detach())
    x = torch.randn(4, 12)
    torch.testing.assert_close(model(x), lora_model(x))
    assert not delta.traits.depends_on_base
    assert not delta.traits.changes_bias


def test_export_to_lora_carries_weight_and_bias():
    model, delta = make()
    perturb(delta)
    lora = plait.adapters(model)["default"].to_lora().deltas["0"]
    assert lora.rank == 6
    torch.testing.assert_close(lora.dense(), delta.dense())
    torch.testing.assert_close(lora.bias(), delta.bias())


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("bias", [True, False])
def test_count(branches, bias):
    _, delta = make(branches=branches, bias=bias)
    r, d_in, d_out = 3, 12, 10
    parallel = r * (d_in + d_out) + (r + d_out) * bias
    sequential = 2 * r * d_out + (r + d_out) * bias
    wanted = {"both": parallel + sequential, "parallel": parallel, "sequential": sequential}
    assert sum(p.numel() for p in delta.parameters()) == wanted[branches]
    assert plait.get_method("hydra").count([delta.site], delta.options) == wanted[branches]


def test_dropout_changes_training_and_not_evaluation():
    model, delta = make(dropout=0.5)
    perturb(delta)
    x = torch.randn(16, 12)
    model.eval()
    torch.testing.assert_close(model(x).double(), oracle(delta, x), rtol=1e-5, atol=1e-5)
    model.train()
    assert not torch.allclose(model(x).double(), oracle(delta, x), atol=1e-3)


def test_dense_needs_the_base_only_for_the_sequential_branch():
    for branches in BRANCHES:
        model, delta = make(branches=branches)
        plait.detach(model)
        if branches == "parallel":
            assert delta.dense().shape == (10, 12)
        else:
            with pytest.raises(PlaitError, match="not attached"):
                delta.dense()


def test_unknown_choices_are_refused():
    with pytest.raises(PlaitError, match="branches"):
        make(branches="three")
    with pytest.raises(PlaitError, match="start"):
        make(start="zeros")


@pytest.mark.parametrize("branches", BRANCHES)
def test_loss_falls_on_a_tiny_llama(branches):
    assert_loss_falls("hydra", lr=0.03, branches=branches, rank=4)
