"""Riemannian preconditioning: closed forms, invariance, conditioning, and PEFT as an oracle."""

from __future__ import annotations

import pytest
import torch
from rule_models import SITES, adapted_lora, batches, dense, make_stack, train
from torch import Tensor, nn

import plait
from plait.rules.riemannian import Riemannian, preconditioned


def sgd(model, rules, lr: float) -> plait.RuleStack:
    return plait.RuleStack(model, rules, lr=lr, optimizer_factory=torch.optim.SGD)


def projection(X: Tensor) -> Tensor:
    return X @ torch.linalg.pinv(X)


def test_a_step_projects_the_full_gradient_on_both_spaces() -> None:
    model, adapter = adapted_lora()
    (ids,) = batches(1)
    weights = {path: d.site.base.weight for path, d in adapter.deltas.items()}
    for w in weights.values():
        w.requires_grad_(True)
    full = torch.autograd.grad(model(ids), list(weights.values()))
    for w in weights.values():
        w.requires_grad_(False)
    factors = {p: (d.A.detach().clone(), d.B.detach().clone()) for p, d in adapter.deltas.items()}
    before, lr = dense(adapter), 1e-7
    train(model, sgd(model, [Riemannian(delta=0.0)], lr), [ids])
    for (path, delta), g in zip(adapter.deltas.items(), full, strict=True):
        A, B = factors[path]
        want = delta.scaling**2 * (projection(B) @ g + g @ projection(A.T))
        moved = (before[path] - delta.dense().detach()) / lr
        torch.testing.assert_close(moved, want, atol=1e-5 * float(want.norm()), rtol=0)


@pytest.mark.parametrize("large", [False, True])
def test_dw_does_not_depend_on_the_factors_basis(large: bool) -> None:
    """Not to first order only: whole runs agree, for a scaling by 10 and for any invertible R."""
    found = []
    for turn in (False, True):
        model, adapter = adapted_lora()
        g = torch.Generator().manual_seed(8)
        for delta in adapter.deltas.values() if turn else ():
            R = torch.randn(3, 3, generator=g, dtype=torch.float64) + 2 * torch.eye(3)
            R = 10.0 * torch.eye(3, dtype=torch.float64) if large else R
            with torch.no_grad():
                delta.A.copy_(torch.linalg.inv(R) @ delta.A)
                delta.B.copy_(delta.B @ R)
        train(model, sgd(model, [Riemannian(delta=0.0)], 0.01), batches(4))
        found.append(dense(adapter))
    for path, value in found[0].items():
        torch.testing.assert_close(found[1][path], value, atol=1e-9, rtol=0)


def factorise(condition: float, rules: list, lr: float, limit: int) -> int:
    """Steps until s B A is 1e5 times nearer to a rank-4 target than at the start, whose singular
    values span `condition`; factors start off by a tenth of the smallest.
    """
    g = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    U, V = torch.linalg.qr(draw(12, 4)).Q, torch.linalg.qr(draw(10, 4)).Q
    root = torch.logspace(0, -0.5 * torch.log10(torch.tensor(condition)).item(), 4).double()
    model = nn.Sequential(nn.Linear(10, 12, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    adapter = plait.attach(model, "lora", rank=4, alpha=4, targets=["0"], seed=0)
    delta, target = adapter.deltas["0"], (U * root**2) @ V.T
    with torch.no_grad():
        delta.B.copy_(U * root + 0.1 * root[-1] * draw(12, 4) / 4)
        delta.A.copy_((V * root + 0.1 * root[-1] * draw(10, 4) / 4).T)
    run = sgd(model, rules, lr)
    x = torch.eye(10, dtype=torch.float64)
    first = (model(x).T - target).detach().norm()
    for step in range(limit):
        gap = model(x).T - target
        if gap.detach().norm() < 1e-5 * first:
            return step
        (0.5 * gap.square().sum()).backward()
        run.step()
    return limit


def test_conditioning_does_not_matter() -> None:
    """As many steps at a condition number of 1,000 as at 1, where plain descent needs far more."""
    well, badly = (factorise(k, [Riemannian(delta=0.0)], 0.3, 200) for k in (1.0, 1e3))
    assert 5 < well < 40 and abs(well - badly) <= 3
    assert factorise(1.0, [], 0.3, 200) < 40
    assert factorise(1e3, [], 0.3, 200) == 200


def test_a_large_delta_is_plain_descent() -> None:
    found = []
    for rules, lr in (([Riemannian(delta=1e9)], 1e7), ([], 1e-2)):
        model, adapter = adapted_lora()
        train(model, sgd(model, rules, lr), batches(3))
        found.append(adapter.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-8, rtol=0)


def test_rank_one_divides_by_the_other_factor_s_square() -> None:
    draw = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
    A, B, GA, GB = draw(1, 7), draw(5, 1), draw(1, 7), draw(5, 1)
    g_A, g_B = preconditioned(GA, GB, A, B, 0.5)
    torch.testing.assert_close(g_A, GA / (B.square().sum() + 0.5))
    torch.testing.assert_close(g_B, GB / (A.square().sum() + 0.5))


@pytest.mark.parametrize("delta", [0.0, 1e-6])
def test_the_start_with_b_zero_moves_b_only(delta: float) -> None:
    model, adapter = adapted_lora(seed=None)
    before = {p: d.A.detach().clone() for p, d in adapter.deltas.items()}
    train(model, sgd(model, [Riemannian(delta)], 1e-2), batches(1))
    for path, d in adapter.deltas.items():
        assert torch.equal(d.A, before[path])
        assert d.B.any() and torch.isfinite(d.B).all()


def test_a_frozen_factor_stays_and_the_other_is_preconditioned() -> None:
    model, adapter = adapted_lora()
    delta = adapter.deltas["layers.0.up"]
    delta.A.requires_grad_(False)
    A, B = delta.A.detach().clone(), delta.B.detach().clone()
    run = sgd(model, [Riemannian(delta=0.0)], 0.1)
    model(batches(1)[0]).backward()
    want = B - 0.1 * delta.B.grad @ torch.linalg.inv(A @ A.T)
    run.step()
    assert torch.equal(delta.A, A)
    torch.testing.assert_close(delta.B.detach(), want, atol=1e-12, rtol=0)


def test_it_trains_as_peft_s_optimiser_does() -> None:
    peft = pytest.importorskip("peft")
    optimizers = pytest.importorskip("peft.optimizers")
    if not hasattr(optimizers, "create_riemannian_optimizer"):
        pytest.skip("this PEFT has no Riemannian optimiser")
    model, adapter = adapted_lora()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=SITES)
    theirs = peft.get_peft_model(make_stack(), config).double()
    modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            modules[path].lora_A["default"].weight.copy_(delta.A)
            modules[path].lora_B["default"].weight.copy_(delta.B)
    optimizer = optimizers.create_riemannian_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, reg=1e-2, weight_decay=0.1
    )
    run = plait.RuleStack(model, [Riemannian(delta=1e-2)], lr=1e-2, weight_decay=0.1)
    for ids in batches(5):
        train(model, run, [ids])
        theirs.base_model.model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    for path, delta in adapter.deltas.items():
        for ours, name in ((delta.A, "lora_A"), (delta.B, "lora_B")):
            other = getattr(modules[path], name)["default"].weight
            torch.testing.assert_close(ours, other, rtol=1e-7, atol=1e-9)


def test_methods_without_pairs_and_negative_deltas_are_refused() -> None:
    model = make_stack()
    plait.attach(model, "ia3", targets=SITES)
    with pytest.raises(plait.PlaitError, match="needs \\(A, B\\) pairs"):
        plait.RuleStack(model, ["riemannian"])
    with pytest.raises(plait.PlaitError, match="at least 0"):
        Riemannian(delta=-1.0)
