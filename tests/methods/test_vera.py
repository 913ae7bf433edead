"""VeRA: one shared pair, two vectors a site; against autograd and PEFT."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny


def two_layers(dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 11)).to(dtype)
    adapter = plait.attach(model, "vera", rank=4, seed=2, **options)
    return model, adapter


def test_the_start_is_the_base_model_exactly():
    model = tiny.llama()
    before = tiny.logits(model)
    plait.attach(model, "vera", rank=8)
    assert torch.equal(tiny.logits(model), before)


def test_sites_share_one_storage():
    _, adapter = two_layers(torch.float32)
    A, B = adapter.shared["A"], adapter.shared["B"]
    assert A.shape == (4, 9) and B.shape == (11, 4)
    for delta in adapter.deltas.values():
        assert delta.factors().A.data_ptr() == A.data_ptr()
        assert delta.shared["B"].data_ptr() == B.data_ptr()
    assert set(adapter.state_dict()) == {"0.b", "0.d", "1.b", "1.d"}


def test_the_pair_comes_from_the_seed_alone():
    _, a = two_layers()
    _, b = two_layers()
    assert torch.equal(a.shared["A"], b.shared["A"]) and torch.equal(a.shared["B"], b.shared["B"])
    bound = (6 / 9) ** 0.5
    assert a.shared["A"].abs().max() <= bound and a.shared["B"].abs().max() <= (6 / 4) ** 0.5
    assert a.shared["A"].abs().max() > 0.8 * bound


def test_forward_and_gradients_equal_the_formula():
    model, adapter = two_layers()
    tiny.scramble(adapter, 0.5)
    delta = adapter.deltas["0"]
    A, B = adapter.shared["A"][:, :9].double(), adapter.shared["B"][:6].double()
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 6, dtype=torch.float64)
    change = delta.b * F.linear(delta.d * F.linear(x, A), B)
    want = F.linear(x, model[0].weight, model[0].bias) + change
    got = model[0](x)
    torch.testing.assert_close(got, want)
    wanted = [x, delta.b, delta.d]
    for a, b in zip(
        torch.autograd.grad(got, wanted, g), torch.autograd.grad(want, wanted, g), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_d_learns_only_after_b_has_moved():
    model, adapter = two_layers()
    delta = adapter.deltas["0"]
    x, g = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    model[0](x).backward(g)
    assert not delta.d.grad.any()
    A, B = adapter.shared["A"][:, :9].double(), adapter.shared["B"][:6].double()
    torch.testing.assert_close(delta.b.grad, (g.T @ x * (B * delta.d @ A)).sum(1))


def test_ranks_may_be_lowered_at_a_site_and_not_raised():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 11))
    adapter = plait.attach(model, "vera", rank=4, overrides={"1": {"rank": 2}})
    assert len(adapter.deltas["1"].d) == 2 and model(torch.randn(2, 9)).shape == (2, 11)
    with pytest.raises(plait.PlaitError, match="lower"):
        plait.attach(model, "vera", rank=4, overrides={"1": {"rank": 5}}, name="other")


def test_counts_and_training():
    model = tiny.llama()
    adapter = plait.attach(model, "vera", rank=32, seed=0)
    sites = [d.site for d in adapter.deltas.values()]
    want = sum(32 + s.out_features for s in sites)
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == want
    losses = tiny.losses(model, adapter, lr=3e-2)
    assert losses[-1] < 0.8 * losses[0]


def test_logits_equal_peft():
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    model, other = tiny.llama(), tiny.llama()
    adapter = plait.attach(model, "vera", rank=8, targets=targets)
    tiny.scramble(adapter, 0.2)
    theirs = peft.get_peft_model(other, peft.VeraConfig(r=8, target_modules=targets)).eval()
    modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        theirs.base_model.vera_A["default"].copy_(adapter.shared["A"])
        theirs.base_model.vera_B["default"].copy_(adapter.shared["B"])
        for path, delta in adapter.deltas.items():
            modules[path].vera_lambda_b["default"].copy_(delta.b)
            modules[path].vera_lambda_d["default"].copy_(delta.d)
    want = theirs(input_ids=tiny.batch()["input_ids"]).logits
    torch.testing.assert_close(tiny.logits(model), want, rtol=1e-5, atol=1e-5)
    assert (
        sum(p.numel() for p in theirs.parameters() if p.requires_grad) == adapter.num_parameters()
    )
