"""S2-LoRA: one pair a shape, gradients that add up, and thresholds that give exact zeros."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait.adapter import bind, install
from plait.errors import PlaitError
from plait.rules.s2_lora import S2Lora


def three_layers(size=0.3, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 9)).double()
    adapter = plait.attach(model, "s2-lora", rank=4, seed=2, **options)
    if size:
        tiny.scramble(adapter, size)
    return model, adapter


def test_the_start_is_the_base_model_exactly_and_orthonormal():
    model = tiny.llama()
    before = tiny.logits(model)
    adapter = plait.attach(model, "s2-lora", rank=8, seed=3)
    assert torch.equal(tiny.logits(model), before)
    A, B = adapter.deltas["model.layers.0.mlp.up_proj"].pair()
    torch.testing.assert_close(A @ A.T, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(B.T @ B, torch.eye(8), atol=1e-5, rtol=0)
    model(**tiny.batch()).loss.backward()
    assert all(d.c.grad.abs().sum() > 0 for d in adapter.deltas.values())
    assert not any(p.grad.any() for p in adapter.shared.parameters())


def test_layers_of_a_shape_share_one_pair_that_is_stored_once():
    model = tiny.llama()
    adapter = plait.attach(model, "s2-lora", rank=8)
    first, second = (adapter.deltas[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1))
    assert all(a is b for a, b in zip(first.pair(), second.pair(), strict=True))
    q, o = (adapter.deltas[f"model.layers.0.self_attn.{n}"] for n in ("q_proj", "o_proj"))
    assert q.pair()[0] is o.pair()[0] and q.pair()[0] is not first.pair()[0]
    shapes = {d.site.shape for d in adapter.deltas.values()}
    wanted = 8 * sum(out + inputs for out, inputs in shapes) + 8 * len(adapter.deltas)
    assert adapter.num_parameters() == wanted
    assert adapter.num_parameters() == sum(t.numel() for t in adapter.state_dict().values())
    sites = [d.site for d in adapter.deltas.values()]
    assert adapter.method.count(sites, adapter.options) == wanted


def test_gradient_of_the_shared_factor_is_the_sum_over_layers():
    model, adapter = three_layers()
    x = torch.randn(5, 6).double()
    weights = [(model[i].weight + adapter.deltas[str(i)].dense()).detach() for i in (0, 2, 3)]
    for w in weights:
        w.requires_grad_()
    h = torch.tanh(F.linear(x, weights[0], model[0].bias))
    out = F.linear(F.linear(h, weights[1], model[2].bias), weights[2], model[3].bias)
    G = torch.autograd.grad(out.square().sum(), weights)
    model(x).square().sum().backward()
    deltas = [adapter.deltas[i] for i in ("0", "2")]
    A, B = deltas[0].pair()
    s = adapter.options.scaling
    want_A = sum(s * d.c[:, None] * (B.T @ g) for d, g in zip(deltas, G, strict=False))
    want_B = sum(s * (g @ A.T) * d.c for d, g in zip(deltas, G, strict=False))
    torch.testing.assert_close(A.grad, want_A)
    torch.testing.assert_close(B.grad, want_B)
    for d, g in zip(deltas, G, strict=False):
        torch.testing.assert_close(d.c.grad, s * torch.diagonal(B.T @ g @ A.T))


def test_coefficients_of_one_are_a_tied_lora():
    _, adapter = three_layers()
    with torch.no_grad():
        for delta in adapter.deltas.values():
            delta.c.fill_(1.0)
    for name in ("0", "2"):
        A, B = adapter.deltas["0"].pair()
        torch.testing.assert_close(adapter.deltas[name].dense(), 2.0 * B @ A)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4), st.floats(0.01, 2.0))
def test_the_threshold_gives_exact_zeros_and_never_turns_a_sign(values, l1):
    model, adapter = three_layers(size=0.0)
    run = plait.RuleStack(model, [S2Lora(l1=l1)], lr=0.1, optimizer_factory=torch.optim.SGD)
    delta, start = adapter.deltas["0"], torch.tensor(values, dtype=torch.float64)
    with torch.no_grad():
        delta.c.copy_(start)
    run.step()  # there are no gradients: only the threshold acts
    wanted = torch.where(start.abs() > 0.1 * l1, start - 0.1 * l1 * start.sign(), 0.0)
    torch.testing.assert_close(delta.c.detach(), wanted, atol=1e-12, rtol=0)
    assert (delta.c * start >= 0).all()
    assert delta.effective_rank == int((start.abs() > 0.1 * l1).sum())


def test_under_adam_the_coefficients_reach_the_lassos_optimum():
    model, adapter = three_layers(size=0.0, targets=["0"])
    delta = adapter.deltas["0"]
    for factor in delta.pair():
        factor.requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, 40, 6, dtype=torch.float64, generator=g)

    def loss():
        return (
            (F.linear(x, model[0].weight + delta.dense(), model[0].bias) - target).square().mean()
        )

    run = plait.RuleStack(model, [S2Lora(l1=0.1, orthogonal=0.0)], lr=1e-2)
    for _ in range(400):
        loss().backward()
        run.step()
    (gradient,) = torch.autograd.grad(loss(), delta.c)
    used = delta.c != 0
    assert 0 < used.sum() < 4
    torch.testing.assert_close(gradient[used], -0.1 * delta.c[used].sign(), atol=5e-3, rtol=0)
    assert (gradient[~used].abs() <= 0.1).all()


def trained(**rule):
    """(components in use of all, greatest entry of A A^T - I) after 30 steps."""
    model = tiny.llama()
    adapter = plait.attach(model, "s2-lora", rank=8, seed=0)
    run = plait.RuleStack(model, [rule := S2Lora(**rule)], lr=1e-2)
    data, losses = tiny.batch(rows=8), []
    for _ in range(30):
        loss = model(**data).loss
        losses.append(loss.item())
        (loss + run.extra_loss()).backward()
        run.step()
    assert losses[-1] < 0.9 * losses[0]
    A, _ = adapter.deltas["model.layers.0.mlp.up_proj"].pair()
    return sum(rule.ranks().values()), float((A @ A.T - torch.eye(8)).detach().abs().max())


def test_training_with_the_rule_is_sparse_and_keeps_the_pair_near_orthonormal():
    dense, loose = trained(l1=0.0, orthogonal=0.0)
    sparse, tight = trained(l1=0.02, orthogonal=1.0)
    assert dense == 8 * 14 and sparse < 0.9 * dense
    assert tight < 0.5 * loose


def test_the_orthogonality_term_is_its_formula():
    model, adapter = three_layers()
    run = plait.RuleStack(model, [S2Lora(orthogonal=0.5)], lr=0.1)
    terms = []
    for name in ("0", "3"):
        A, B = adapter.deltas[name].pair()
        eye = torch.eye(4).double()
        terms.append((A @ A.T - eye).norm() ** 2 + (B.T @ B - eye).norm() ** 2)
    torch.testing.assert_close(run.extra_loss(), 0.5 * sum(terms) / 2)


def test_export_in_the_effective_rank_keeps_the_outputs():
    model, adapter = three_layers()
    with torch.no_grad():
        for i, delta in enumerate(adapter.deltas.values()):
            delta.c[i + 1 :] = 0.0
    x = torch.randn(5, 6).double()
    wanted = model(x)
    for path, delta in adapter.deltas.items():
        low = adapter.to_lora(rank=delta.effective_rank).deltas[path]
        torch.testing.assert_close(low.dense(), delta.dense(), atol=1e-12, rtol=0)
        assert low.rank == delta.effective_rank
    low = adapter.to_lora(rank=3)
    plait.detach(model)
    install(model, bind(low, model))
    torch.testing.assert_close(model(x), wanted)


def test_what_does_not_fit_is_refused():
    with pytest.raises(PlaitError, match="shares"):
        three_layers(overrides={"2": {"rank": 2}})
    model = tiny.llama()
    plait.attach(model, "lora")
    with pytest.raises(PlaitError, match="s2-lora"):
        plait.RuleStack(model, ["s2-lora"])
    model, _ = three_layers()
    with pytest.raises(PlaitError, match="at least 0"):
        plait.RuleStack(model, [{"s2-lora": {"l1": -1}}])
