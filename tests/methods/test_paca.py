"""PaCA against autograd on a fully trained W, and the promise that W comes back bit for bit."""

import copy

import pytest
import torch
from torch import nn

import plait
from plait.errors import PlaitError
from plait.kernels import use_reference
from tiny_llama import assert_loss_falls


def make(bias=True, dtype=torch.float32, **options):
    model = nn.Sequential(nn.Linear(20, 14, bias=bias), nn.Tanh(), nn.Linear(14, 6, bias=bias))
    model = model.to(dtype)
    adapter = plait.attach(model, "paca", **{"rank": 4, "seed": 3, **options})
    return model, adapter


def perturb(adapter):
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))


def weights(model):
    return [m.weight.detach().clone() for m in model if isinstance(m, nn.Linear)]


def test_start_is_the_base_in_bits():
    base = nn.Sequential(nn.Linear(20, 14))
    x = torch.randn(5, 20)
    wanted = base(x)
    plait.attach(base, "paca", rank=4)
    assert torch.equal(base(x), wanted)


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_gradients_equal_a_fully_trained_weight_restricted_to_the_columns(alpha):
    model, adapter = make(alpha=alpha)
    perturb(adapter)
    layer, delta = model[0], adapter.deltas["0"]
    x = torch.randn(2, 5, 20, requires_grad=True)
    layer(x).pow(2).sum().backward()
    oracle = layer.weight.detach().clone().requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    nn.functional.linear(x2, oracle, layer.bias).pow(2).sum().backward()
    wanted = delta.options.scaling * oracle.grad[:, delta.columns]
    torch.testing.assert_close(delta.P.grad, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-5, atol=1e-5)


def test_only_the_chosen_columns_of_the_live_weight_change_in_training():
    model, adapter = make(bias=False)
    before = weights(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    for _ in range(4):
        model(torch.randn(8, 20)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(torch.randn(8, 20))
    for path, old in zip(adapter.deltas, before, strict=True):
        delta = adapter.deltas[path]
        moved = (delta.site.weight() != old).any(0)
        assert set(moved.nonzero().flatten().tolist()) == set(delta.columns.tolist())
        torch.testing.assert_close(delta.site.weight() - old, delta.dense())


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    ],
)
def test_any_optimiser_step_reaches_the_next_forward(make_optimizer):
    model, adapter = make()
    base = copy.deepcopy(model)
    plait.detach(base)
    optimizer = make_optimizer(list(adapter.parameters()))
    x = torch.randn(8, 20)
    for _ in range(3):
        model(x).pow(2).sum().backward()
        optimizer.step()
        for path, delta in adapter.deltas.items():
            target = base.get_submodule(path)
            wanted = target.weight + delta.dense()
            h = torch.randn(3, target.in_features)
            got = delta.site.base(h)
            torch.testing.assert_close(got, nn.functional.linear(h, wanted, target.bias))


def test_saved_for_backward_is_rank_numbers_a_token():
    model = nn.Sequential(nn.Linear(64, 48))
    model[0].requires_grad_(False)
    plait.attach(model, "paca", rank=4)
    sizes = []

    def pack(t):
        if t is not model[0].weight and t.data_ptr() != model[0].weight.data_ptr():
            sizes.append(t.numel() * t.element_size())
        return t

    x = torch.randn(32, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    assert sum(sizes) == 32 * 4 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_in_bits_when_inactive_or_detached(dtype):
    model, adapter = make(dtype=dtype)
    plait.activate(model, {})
    before = weights(model)
    plait.activate(model, "default")
    perturb(adapter)
    model(torch.randn(3, 20, dtype=dtype))
    assert not torch.equal(model[0].weight, before[0])
    plait.activate(model, {})
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    plait.activate(model, "default")
    plait.detach(model)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_micro_batches_accumulate_to_the_big_batch():
    model, adapter = make()
    perturb(adapter)
    x = torch.randn(12, 20)
    model(x).pow(2).sum().backward()
    big = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    for part in x.chunk(3):
        model(part).pow(2).sum().backward()
    for p, wanted in zip(adapter.parameters(), big, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-5, atol=1e-5)


def test_interleaved_graphs_all_reach_backward():
    model, adapter = make()
    perturb(adapter)
    first, second = (model(torch.randn(3, 20)).sum() for _ in range(2))
    first.backward()
    third = model(torch.randn(3, 20)).sum()
    (second + third).backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_export_is_the_change_of_the_columns_and_exact_as_lora():
    model, adapter = make()
    base = copy.deepcopy(model)
    plait.detach(base)
    perturb(adapter)
    x = torch.randn(7, 20)
    wanted = model(x)
    lora = adapter.to_lora()
    for path, low in lora.deltas.items():
        torch.testing.assert_close(low.dense(), adapter.deltas[path].dense())
    from plait.adapter import bind, install

    install(base, bind(lora, base))
    torch.testing.assert_close(base(x), wanted, rtol=1e-5, atol=1e-5)


def test_plain_path_gives_the_same_values_and_gradients():
    model, adapter = make(alpha=8.0)
    perturb(adapter)
    x = torch.randn(6, 20)
    fast = model(x)
    fast.pow(2).sum().backward()
    grads = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    perturbed = adapter.deltas["0"].P
    with torch.no_grad():  # W is now stale: the plain path must not rely on it
        perturbed.add_(0.1)
        perturbed.sub_(0.1)
    with use_reference():
        slow = model(x)
        slow.pow(2).sum().backward()
    torch.testing.assert_close(slow, fast, rtol=1e-5, atol=1e-5)
    for p, wanted in zip(adapter.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-5, atol=1e-5)


def test_plain_path_is_right_on_a_stale_weight():
    model, adapter = make()
    perturb(adapter)
    x = torch.randn(6, 20)
    model(x)
    perturb(adapter)
    with use_reference():
        plain = model(x)
    torch.testing.assert_close(plain, model(x), rtol=1e-5, atol=1e-5)


def test_a_deep_copy_of_an_active_model_is_independent():
    model, adapter = make()
    before = weights(model)
    perturb(adapter)
    x = torch.randn(4, 20)
    wanted = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), wanted)
    plait.activate(twin, {})
    assert all(torch.equal(a, b) for a, b in zip(weights(twin), before, strict=True))
    assert torch.equal(model(x), wanted)


def test_base_weights_loaded_over_the_columns_are_written_again():
    model, adapter = make()
    plait.activate(model, {})
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plait.activate(model, "default")
    perturb(adapter)
    x = torch.randn(4, 20)
    wanted = model(x)
    model.load_state_dict(state)
    assert torch.equal(model(x), wanted)


def test_stacking_and_weights_are_refused():
    model, _ = make()
    plait.attach(model, "lora", name="b", rank=2, activate=False)
    with pytest.raises(PlaitError, match="alone"):
        plait.activate(model, ["default", "b"])
    with pytest.raises(PlaitError, match="weight 1"):
        plait.activate(model, {"default": 0.5})


def test_indices_come_from_the_seed_and_are_distinct():
    _, a = make(seed=5)
    _, b = make(seed=5)
    _, c = make(seed=6)
    assert torch.equal(a.deltas["0"].columns, b.deltas["0"].columns)
    assert not torch.equal(a.deltas["0"].columns, c.deltas["0"].columns)
    assert len(set(a.deltas["0"].columns.tolist())) == 4


def test_count_and_rank_too_large():
    model, adapter = make()
    sites = [d.site for d in adapter.deltas.values()]
    method = plait.get_method("paca")
    assert adapter.num_parameters() == method.count(sites, adapter.options) == 4 * (14 + 6)
    with pytest.raises(PlaitError, match="columns"):
        plait.attach(model, "paca", name="b", rank=15)


def test_autocast_agrees_with_the_reference():
    model, adapter = make()
    perturb(adapter)
    x = torch.randn(6, 20)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
        got.float().pow(2).sum().backward()
    assert got.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())
    torch.testing.assert_close(got.float(), model(x), rtol=0.05, atol=0.05)


def test_loss_falls_on_a_tiny_llama():
    assert_loss_falls("paca", rank=4, lr=0.02)
