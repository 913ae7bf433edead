"""ALLoRA: factors, the exact gradient of the scaled change, and what survives an Adam."""

from __future__ import annotations

import pytest
import torch
from rule_models import batches, make_stack, randomise, train
from torch import Tensor, nn

import plait
from plait.adapter.state import find_state
from plait.rules._row_norms import change_norms, row_norms
from plait.rules.allora import Allora

TARGETS = ("delta_rows", "B_rows", "param_rows")
F64 = torch.float64


def sgd(model: nn.Module, rules: list, lr: float = 0.1) -> plait.RuleStack:
    return plait.RuleStack(model, rules, lr=lr, optimizer_factory=torch.optim.SGD)


def lora_stack(rank: int = 2, **options) -> tuple[nn.Module, plait.Adapter]:
    model = make_stack()
    adapter = plait.attach(model, "lora", rank=rank, alpha=3 * rank, seed=0, **options)
    return model, adapter


def state(adapter: plait.Adapter) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in adapter.state_dict().items()}


def after(rules: list, steps: int = 4, lr: float = 0.1, optimizer=torch.optim.SGD):
    model, adapter = lora_stack()
    randomise(adapter)
    run = plait.RuleStack(model, rules, lr=lr, optimizer_factory=optimizer)
    train(model, run, batches(steps))
    run.finish()
    return state(adapter)


def test_row_norms_are_those_of_the_product() -> None:
    g = torch.Generator().manual_seed(0)
    B, A = torch.randn(3, 9, 2, generator=g, dtype=F64), torch.randn(3, 2, 5, generator=g).double()
    torch.testing.assert_close(row_norms(B, A), (B @ A).norm(dim=-1))


@pytest.mark.parametrize("initializer", [None, "pissa"])
def test_every_row_starts_at_eta(initializer: str | None) -> None:
    _, adapter = lora_stack(initializer=initializer)
    rule = Allora(eta=3.0)
    for pair in adapter.pairs():
        c = rule.factor(change_norms(pair))
        assert c.shape == (pair.delta.site.out_features,)
        torch.testing.assert_close(c, torch.full_like(c, 3.0), atol=1e-5, rtol=0)


def test_the_factor_falls_with_the_norm_and_is_the_card_s() -> None:
    norms = torch.linspace(0, 50, 400, dtype=F64)
    c = Allora(eta=5.0).factor(norms)
    torch.testing.assert_close(c, 1 / (norms + 1 / 25).sqrt())
    assert (c.diff() < 0).all() and float(c.max()) == pytest.approx(5.0)


def gradients_of_weights(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """dL/dW of every adapted module, which is dL/d(dW): found with the base's own autograd."""
    bases = {p: m for p, m in model.named_modules() if getattr(m, "_plait_plan", None)}
    for m in bases.values():
        m.weight.requires_grad_(True)
    grads = torch.autograd.grad(model(ids), [m.weight for m in bases.values()])
    for m in bases.values():
        m.weight.requires_grad_(False)
    return dict(zip(bases, grads, strict=True))


@pytest.mark.parametrize("apply", ["update", "grad"])
@pytest.mark.parametrize("targets", ["all-linear", "embeddings"])
def test_with_sgd_both_factors_get_the_gradient_of_the_scaled_change(
    apply: str, targets: str
) -> None:
    model, adapter = lora_stack(targets=targets)
    randomise(adapter)
    (ids,) = batches(1)
    G = gradients_of_weights(model, ids)
    want = {}
    for pair in adapter.pairs():
        g = G[pair.path].t() if targets == "embeddings" else G[pair.path]
        A, B, s = pair.A.detach().clone(), pair.B.detach().clone(), pair.scale
        scaled = Allora().factor((s * B @ A).norm(dim=1))[:, None] * g
        want[f"{pair.path}.A"] = A - 0.1 * s * B.T @ scaled
        want[f"{pair.path}.B"] = B - 0.1 * s * scaled @ A.T
    train(model, sgd(model, [Allora(apply=apply)]), [ids])
    for name, value in want.items():
        torch.testing.assert_close(adapter.state_dict()[name], value, atol=1e-12, rtol=1e-9)


def test_convolutions_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, dtype=F64)).requires_grad_(False)
    adapter = plait.attach(model, "lora", rank=2, seed=0, targets="all-conv")
    randomise(adapter)
    (pair,) = adapter.pairs()
    x = torch.randn(2, 3, 6, 6, dtype=F64)
    model[0].weight.requires_grad_(True)
    (G,) = torch.autograd.grad(model(x).square().sum(), model[0].weight)
    model[0].weight.requires_grad_(False)
    A, B = pair.A.detach().clone(), pair.B.detach().clone()
    c = Allora().factor((pair.scale * B @ A).norm(dim=1))[:, None]
    run = sgd(model, [Allora()], lr=1e-3)
    model(x).square().sum().backward()
    run.step()
    torch.testing.assert_close(pair.A.detach(), A - 1e-3 * pair.scale * B.T @ (c * G.flatten(1)))


@pytest.mark.parametrize("target", TARGETS)
def test_update_and_gradient_are_the_same_under_sgd(target: str) -> None:
    one, two = (after([Allora(target=target, apply=apply)]) for apply in ("update", "grad"))
    plain = after([])
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-12, rtol=1e-9)
    assert any(not torch.allclose(value, plain[name], atol=1e-3) for name, value in one.items())


def test_an_adam_cancels_the_factor_on_the_gradient_and_not_on_the_update() -> None:
    def far(apply: str) -> float:
        ours = after([Allora(target="B_rows", apply=apply)], 8, 1e-3, torch.optim.AdamW)
        return max(float((ours[name] - plain[name]).abs().max()) for name in plain)

    plain = after([], 8, 1e-3, torch.optim.AdamW)
    assert far("grad") < 0.1 * far("update")


def test_rows_of_one_norm_make_it_lora_at_another_rate() -> None:
    def run_once(rules: list, factor: float = 1.0) -> dict[str, Tensor]:
        model, adapter = lora_stack()
        g = torch.Generator().manual_seed(4)
        for pair in adapter.pairs():
            A, B = (torch.randn(*p.shape, generator=g, dtype=F64) for p in (pair.A, pair.B))
            A = torch.linalg.qr(A.T).Q.T
            pair.delta.set_pair(A, 0.5 * B / B.norm(dim=1, keepdim=True))
        train(model, sgd(model, rules, lr=0.1 * factor), batches(1))
        return state(adapter)

    c = 1 / (3 * 0.5 + 1 / 4) ** 0.5  # scaling 3, rows of norm 1/2, eta 2
    want = run_once([], c)
    for name, value in run_once([Allora()]).items():
        torch.testing.assert_close(value, want[name], atol=1e-12, rtol=1e-9)


def test_outputs_and_input_gradients_stay_what_they_are() -> None:
    model, adapter = lora_stack()
    randomise(adapter)
    (ids,) = batches(1)
    plain = model.train()(ids)
    lowest = adapter.pairs()[0]
    (before,) = torch.autograd.grad(plain, lowest.B)
    run = sgd(model, [Allora()])
    first, second = model(ids), model(ids)
    assert torch.equal(first, plain) and torch.equal(first, second)
    # B's gradient at the lowest site passes through every layer above it.
    torch.testing.assert_close(torch.autograd.grad(first, lowest.B)[0], before)
    run.finish()
    for pair in adapter.pairs():
        assert not pair.delta.site.base._forward_hooks


def test_with_alpha_equal_to_the_rank_the_merged_weight_has_no_scale() -> None:
    model = make_stack()
    adapter = plait.attach(model, "lora", rank=2, alpha=2, seed=0)
    W = {p.path: p.delta.site.weight().clone() for p in adapter.pairs()}
    run = sgd(model, [Allora()])
    train(model, run, batches(2))
    run.finish()
    want = {p.path: W[p.path] + (p.B @ p.A).detach() for p in adapter.pairs()}
    plait.fuse(model)
    for path, value in want.items():
        torch.testing.assert_close(model.get_submodule(path).weight.detach(), value)


@pytest.mark.parametrize(
    ("method", "options", "rule", "message"),
    [
        ("lora", {"dropout": 0.1}, {}, "replaces dropout"),
        ("dora", {}, {}, "target B_rows"),
        ("loha", {}, {}, "pairs"),
    ],
)
def test_what_it_cannot_scale_is_refused(method, options, rule, message) -> None:
    model = make_stack()
    plait.attach(model, method, rank=2, seed=0, **options)
    with pytest.raises(plait.PlaitError, match=message):
        plait.RuleStack(model, [Allora(**rule)])


def test_an_adapter_at_another_weight_is_refused() -> None:
    model, adapter = lora_stack()
    plait.activate(model, {adapter.name: 0.5})
    assert find_state(model).active
    with pytest.raises(plait.PlaitError, match="at weight 1"):
        plait.RuleStack(model, [Allora()])
    plait.RuleStack(model, [Allora(target="B_rows")])


def test_wrong_options_are_named() -> None:
    with pytest.raises(plait.PlaitError, match="target is 'rows'"):
        Allora(target="rows")  # type: ignore[arg-type]
    with pytest.raises(plait.PlaitError, match="eta"):
        Allora(eta=0)
