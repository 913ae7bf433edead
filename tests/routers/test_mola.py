"""MoLA against a loop over tokens and experts, and its balance loss against the card's formula."""

import pytest
import torch
from torch import nn

import plait
from plait.errors import PlaitError
from tiny_llama import assert_loss_falls, tiny_llama, tokens


class Net(nn.Module):
    def __init__(self, layers=4):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(12, 12)) for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def make(layers=4, **options):
    model = Net(layers)
    adapter = plait.attach(model, "mola", **{"rank": 3, "seed": 1, **options})
    return model, adapter


def perturb(adapter):
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))


def naive(delta, x):
    """Token by token, expert by expert, in float64."""
    R, A, B = (p.detach().double() for p in (delta.router, delta.A, delta.B))
    out = []
    for t in x.double().reshape(-1, x.shape[-1]):
        q = torch.softmax(R @ t, 0)
        best = q.topk(delta.top_k).indices
        w = q[best] / q[best].sum()
        change = sum(w[j] * (B[:, e] @ (A[e] @ t)) for j, e in enumerate(best.tolist()))
        out.append(delta.options.scaling * change)
    return torch.stack(out).view(*x.shape[:-1], -1)


def test_forward_equals_the_loop_over_tokens_and_experts():
    model, adapter = make(experts=5, top_k=2)
    perturb(adapter)
    delta = adapter.deltas["layers.0.0"]
    x = torch.randn(2, 7, 12)
    wanted = delta.site.forward(x).double() + naive(delta, x)
    got = model.layers[0](x)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    change = delta(x).double()
    torch.testing.assert_close(change, naive(delta, x), rtol=1e-5, atol=1e-5)


def test_start_is_the_base_in_bits():
    model, _ = make()
    x = torch.randn(5, 12)
    got = model(x)
    plait.activate(model, {})
    assert torch.equal(got, model(x))


def test_count():
    _, adapter = make(experts=[1, 3], top_k=1)
    sites = [d.site for d in adapter.deltas.values()]
    wanted = sum(n * (3 * 24 + 12) for n in (1, 1, 3, 3))
    assert adapter.num_parameters() == wanted
    assert plait.get_method("mola").count(sites, adapter.options) == wanted


def test_experts_are_spread_over_the_layers():
    _, default = make(layers=8)
    assert [d.experts for d in default.deltas.values()] == [2, 2, 4, 4, 6, 6, 8, 8]
    _, shallow = make(layers=2)
    assert [d.experts for d in shallow.deltas.values()] == [2, 6]
    _, listed = make(experts=[3, 2, 2, 5], top_k=[1, 2])
    assert [d.experts for d in listed.deltas.values()] == [3, 2, 2, 5]
    assert [d.top_k for d in listed.deltas.values()] == [1, 1, 2, 2]


def test_lists_that_do_not_fit_and_too_many_active_experts_are_refused():
    for experts in ([2, 2, 2], [2] * 8, []):
        with pytest.raises(PlaitError, match="adapted layers"):
            make(experts=experts)
    with pytest.raises(PlaitError, match="top_k"):
        make(experts=2, top_k=3)


def test_one_expert_is_plain_lora():
    model, adapter = make(experts=1, top_k=1)
    perturb(adapter)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    lora = plait.attach(plain, "lora", rank=3)
    for path, delta in adapter.deltas.items():
        lora.deltas[path].set_pair(delta.A[0].detach(), delta.B[:, 0].detach())
    x = torch.randn(6, 12)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-6)


def test_identical_experts_are_plain_lora_whatever_the_router_says():
    model, adapter = make(experts=4)
    perturb(adapter)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    lora = plait.attach(plain, "lora", rank=3)
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            delta.A.copy_(delta.A[:1].expand_as(delta.A))
            delta.B.copy_(delta.B[:, :1].expand_as(delta.B))
            lora.deltas[path].set_pair(delta.A[0], delta.B[:, 0])
    x = torch.randn(6, 12)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)


def test_router_learns_from_the_task_with_two_active_experts_and_not_with_one():
    for top_k, learns in ((2, True), (1, False)):
        model, adapter = make(experts=3, top_k=top_k)
        perturb(adapter)
        model(torch.randn(6, 12)).pow(2).sum().backward()
        grad = adapter.deltas["layers.0.0"].router.grad
        assert bool(grad.abs().sum() > 1e-6) == learns


def balance_oracle(model, adapter, x, mask=None):
    """The card's loss for layers of one linear each, from logits computed here."""
    total = 0.0
    for i, layer in enumerate(model.layers):
        delta = adapter.deltas[f"layers.{i}.0"]
        q = torch.softmax(x.double() @ delta.router.double().t(), -1).reshape(-1, delta.experts)
        if mask is not None:
            q = q[mask.flatten().bool()]
        slots = torch.zeros(delta.experts, dtype=torch.double)
        for row in q:
            slots[row.topk(delta.top_k).indices] += 1
        total = total + delta.experts * (slots / slots.sum() * q.mean(0)).sum()
        x = torch.tanh(layer(x))
    return total


def test_balance_loss_equals_its_formula_and_reaches_the_router():
    model, adapter = make(experts=3, balance=0.5)
    perturb(adapter)
    x = torch.randn(2, 6, 12)
    model(x)
    loss = plait.auxiliary_loss(model)
    wanted = 0.5 * balance_oracle(model, adapter, x)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    model(x)
    plait.auxiliary_loss(model).backward()
    assert adapter.deltas["layers.0.0"].router.grad.abs().sum() > 0
    assert adapter.deltas["layers.3.0"].B.grad is None


def test_padding_does_not_count():
    model, adapter = make(experts=3, balance=1.0)
    perturb(adapter)
    x = torch.randn(2, 6, 12)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    with plait.routing(model, attention_mask=mask):
        model(x)
        first = plait.auxiliary_loss(model)
        torch.testing.assert_close(first.double(), balance_oracle(model, adapter, x, mask))
        model(torch.where(mask[..., None].bool(), x, 100.0))
        torch.testing.assert_close(plait.auxiliary_loss(model), first)


def test_uniform_routing_adds_one_a_layer():
    model, adapter = make(experts=4, balance=1.0)
    with torch.no_grad():
        for delta in adapter.deltas.values():
            delta.router.zero_()
    model(torch.randn(64, 12))
    assert plait.auxiliary_loss(model).item() == pytest.approx(4.0)


def test_all_linears_of_a_layer_are_one_term():
    model = tiny_llama()
    adapter = plait.attach(model, "mola", rank=2, experts=3, balance=1.0)
    with torch.no_grad():
        for delta in adapter.deltas.values():
            delta.router.zero_()
    model(tokens())
    assert len(adapter.deltas) == 14
    assert plait.auxiliary_loss(model).item() == pytest.approx(2.0)


def test_without_weight_there_is_no_balance_loss():
    model, _ = make(balance=0.0)
    model(torch.randn(3, 12))
    assert plait.auxiliary_loss(model) == 0.0


def test_two_mixtures_on_one_model_keep_their_own_statistics():
    model, first = make(experts=3, balance=1.0)
    second = plait.attach(model, "mola", name="b", rank=3, experts=2, balance=1.0, seed=9)
    perturb(first)
    perturb(second)
    x = torch.randn(5, 12)
    plait.activate(model, ["default", "b"])
    model(x)
    both = plait.auxiliary_loss(model)
    assert both.item() == pytest.approx((first.auxiliary_loss() + second.auxiliary_loss()).item())
    y = torch.nn.functional.linear(x, model.layers[0][0].weight, model.layers[0][0].bias)
    deltas = [a.deltas["layers.0.0"] for a in (first, second)]
    wanted = y.double() + sum(naive(d, x) for d in deltas)
    torch.testing.assert_close(model.layers[0](x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_jitter_acts_in_training_only():
    model, adapter = make(experts=4, jitter=0.9)
    perturb(adapter)
    x = torch.randn(9, 12)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_a_mixture_can_be_neither_fused_nor_exported():
    model, adapter = make()
    with pytest.raises(PlaitError, match="not linear"):
        plait.fuse(model)
    with pytest.raises(PlaitError, match="not linear"):
        adapter.to_lora()


def test_loss_falls_on_a_tiny_llama():
    assert_loss_falls("mola", rank=4)
