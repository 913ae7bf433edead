"""LoRA-MGPO and LoRA-GGPO: what is perturbed by how much, when, and that nothing else sees it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rule_models import batches, make_stack, randomise, train
from torch import Tensor, nn

import plait
from plait.rules._row_noise import drawn
from plait.rules._row_norms import gradient_norms
from plait.rules.lora_ggpo import METHOD, LoraGgpo
from plait.testing.rules import RULE_CHECKS, RuleCase

F64 = torch.float64


def prepared(rule: LoraGgpo, factory=None, lr: float = 1e-2, **options):
    model = make_stack()
    adapter = plait.attach(model, "lora", rank=2, seed=0, **options)
    randomise(adapter)
    run = plait.RuleStack(model.train(), [rule], lr=lr, seed=3, optimizer_factory=factory)
    return model, adapter, run


def flat(adapter: plait.Adapter) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in adapter.parameters()])


def flat_gradient(adapter: plait.Adapter) -> Tensor:
    return torch.cat([p.grad.flatten().clone() for p in adapter.parameters()])


def moments(adapter: plait.Adapter, run: plait.RuleStack) -> Tensor:
    found = [run.optimizer.state[p]["exp_avg"] for p in adapter.parameters()]
    return torch.cat([m.flatten().clone() for m in found])


@pytest.mark.parametrize("rule", [{"rho": 0.0}, {"form": "ggpo", "sigma": 0.0, "kappa": 0.0}])
def test_a_perturbation_of_zero_is_plain_training_bit_for_bit(rule: dict) -> None:
    found = []
    for rules in ([LoraGgpo(**rule)], []):
        model = make_stack()
        adapter = plait.attach(model, "lora", rank=2, seed=0)
        run = plait.RuleStack(model.train(), rules, lr=1e-2)
        train(model, run, batches(4))
        found.append(flat(adapter))
    assert torch.equal(*found)


def test_the_weights_move_along_the_moment_by_rho_over_the_smoothed_norm() -> None:
    rule = LoraGgpo(rho=0.05, beta=0.7, limit=None)
    model, adapter, run = prepared(rule)
    smoothed = None
    for ids in batches(5):
        theta = flat(adapter)
        loss = model(ids)
        eps = flat(adapter) - theta
        if smoothed is None:
            assert torch.equal(flat(adapter), theta), "the first step is a plain one"
        else:
            m = moments(adapter, run)
            torch.testing.assert_close(eps.norm(), torch.tensor(0.05 / smoothed, dtype=F64))
            torch.testing.assert_close(eps @ m, eps.norm() * m.norm())
        loss.backward()
        norm = float(flat_gradient(adapter).norm())
        smoothed = norm if smoothed is None else 0.7 * smoothed + 0.3 * norm
        run.before_step()
        assert torch.equal(flat(adapter), theta), "the update starts where the step started"
        run.optimizer.step()
        run.after_step()
        run.optimizer.zero_grad()
        assert float(rule._moment.norm) == pytest.approx(smoothed)


def test_the_gradient_is_that_of_the_perturbed_weights() -> None:
    model, adapter, run = prepared(LoraGgpo(limit=None))
    first, second = batches(2)
    train(model, run, [first])
    m, theta = moments(adapter, run), flat(adapter)
    model(second).backward()
    found = flat_gradient(adapter)
    run.before_step()
    run.optimizer.zero_grad()
    moved = theta + 0.05 / float(run.rules[0]._moment.norm) * m / m.norm()
    torch.nn.utils.vector_to_parameters(moved, adapter.parameters())
    want = torch.autograd.grad(model.eval()(second), list(adapter.parameters()))
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in want]))


def test_a_loss_of_another_scale_gives_a_perturbation_of_the_inverse_scale() -> None:
    def run_once(scale: float) -> tuple[float, Tensor]:
        rule = LoraGgpo(rho=1e-6, limit=None)  # small: the gradients must be the same ones
        model, adapter, run = prepared(rule, torch.optim.SGD, lr=0.0)
        for ids in batches(3):
            (scale * model(ids)).backward()
            run.step()
        theta = flat(adapter)
        model(batches(1)[0])
        return float(rule._moment.norm), flat(adapter) - theta

    (norm, eps), (other, shrunk) = run_once(1.0), run_once(8.0)
    assert other == pytest.approx(8 * norm, rel=1e-5)
    torch.testing.assert_close(8 * shrunk, eps, atol=1e-12, rtol=1e-4)


def test_the_perturbation_is_held_to_a_share_of_the_weights() -> None:
    model, adapter, run = prepared(LoraGgpo(rho=100.0, limit=0.2))
    train(model, run, batches(1))
    theta = flat(adapter)
    model(batches(1)[0])
    torch.testing.assert_close((flat(adapter) - theta).norm(), 0.2 * theta.norm())


def test_an_optimiser_without_moments_gets_them_from_the_rule() -> None:
    rule = LoraGgpo(mu=0.6, limit=None)
    model, adapter, run = prepared(rule, torch.optim.SGD)
    own = torch.zeros_like(flat(adapter))
    for ids in batches(3):
        model(ids).backward()
        own = 0.6 * own + 0.4 * flat_gradient(adapter)
        run.step()
    theta = flat(adapter)
    model(batches(1)[0])
    eps = flat(adapter) - theta
    torch.testing.assert_close(eps / eps.norm(), own / own.norm())


def test_a_step_has_one_perturbation_and_other_forwards_see_none() -> None:
    model, adapter, run = prepared(LoraGgpo(rho=0.5))
    first, second = batches(2)
    train(model, run, [first])
    plain = model.eval()(second).detach()
    theta = flat(adapter)
    loss = model.train()(second)
    moved = flat(adapter)
    assert not torch.equal(moved, theta) and not torch.equal(loss.detach(), plain)
    with torch.no_grad():
        assert torch.equal(model(second), plain)  # training mode, no gradient
        assert torch.equal(model.eval()(second), plain)
    assert torch.equal(flat(adapter), moved), "backward needs the perturbed weights again"
    loss.backward()
    model.train()(first).backward()
    assert torch.equal(flat(adapter), moved), "one perturbation for all micro-batches"
    run.step()
    assert torch.equal(model.eval()(second), model(second))


def test_an_evaluation_between_forward_and_backward_does_not_change_the_gradient() -> None:
    def gradient(evaluates: bool) -> Tensor:
        model, adapter, run = prepared(LoraGgpo(rho=0.5))
        first, second = batches(2)
        train(model, run, [first])
        loss = model.train()(second)
        if evaluates:
            model.eval()(first)
        loss.backward()
        return flat_gradient(adapter)

    assert torch.equal(gradient(True), gradient(False))


def test_an_interrupted_step_ends_with_the_weights_back() -> None:
    model, adapter, run = prepared(LoraGgpo(rho=0.5))
    train(model, run, batches(1))
    theta = flat(adapter)
    model.train()(batches(1)[0])
    run.finish()
    assert torch.equal(flat(adapter), theta)
    assert not model._forward_hooks and not model._forward_pre_hooks


# -- ggpo -----------------------------------------------------------------------------------------


def test_rows_of_the_noise_have_the_deviation_that_is_asked_for() -> None:
    want = torch.tensor([0.0, 0.01, 0.5, 3.0])
    E = torch.cat([part for _, part in drawn(want, torch.empty(0, 40_000), 7)])
    assert E.shape == (4, 40_000)
    torch.testing.assert_close(E.std(1), want, rtol=0.02, atol=0)
    assert abs(float((E[1] @ E[2]) / E[1].norm() / E[2].norm())) < 0.02


def test_deviations_come_from_the_norms_of_weights_and_gradients() -> None:
    rule = LoraGgpo(form="ggpo", sigma=0.3, kappa=2.0)
    model, adapter, run = prepared(rule)
    (ids,) = batches(1)
    modules = {p.path: p.delta.site.base for p in adapter.pairs()}
    for module in modules.values():
        module.weight.requires_grad_(True)
    model(ids).backward()
    gradient = {}
    for pair in adapter.pairs():
        # First-order change of dW along the gradients, by autograd's forward mode.
        product = lambda B, A, s=pair.scale: s * B @ A  # noqa: E731
        both = (pair.B.detach(), pair.A.detach()), (pair.B.grad, pair.A.grad)
        gradient[pair.path] = torch.func.jvp(product, *both)[1].norm(dim=1)
        torch.testing.assert_close(gradient_norms(pair), gradient[pair.path])
    for module in modules.values():
        module.weight.requires_grad_(False)
    run.step()
    for pair in adapter.pairs():
        n = modules[pair.path].weight.detach().norm(dim=1).mean()
        dW = (pair.scale * pair.B @ pair.A).detach()
        w = (n**2 + dW.square().sum(1)).sqrt()
        want = (0.3 * w + 2.0 * gradient[pair.path] ** 2) / len(dW) ** 0.5
        found = rule._noise.deviations[f"{adapter.name}/{pair.path}"]
        torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


def site_alone(rows: int = 9) -> tuple[nn.Module, plait.Adapter, plait.RuleStack]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, rows, dtype=F64)).requires_grad_(False)
    adapter = plait.attach(model, "lora", rank=2, seed=0)
    randomise(adapter)
    rule = LoraGgpo(form="ggpo", sigma=1.0)
    return model.train(), adapter, plait.RuleStack(model, [rule], lr=0.0, seed=3)


def test_the_input_s_gradient_sees_the_noise_and_the_pair_s_does_not(monkeypatch) -> None:
    monkeypatch.setattr("plait.rules._row_noise._BLOCK", 12)  # blocks of two rows
    model, adapter, run = site_alone()
    (pair,) = adapter.pairs()
    model(torch.eye(6, dtype=F64)).square().sum().backward()
    run.step()
    x = torch.eye(6, dtype=F64, requires_grad=True)
    with torch.no_grad():
        plain = model.eval()(x)
    W = model[0].weight + (pair.scale * pair.B @ pair.A).detach()
    noisy = model.train()(x)
    assert torch.equal(noisy, model(x)), "one draw a step"
    E = (noisy.detach() - plain).T
    g = torch.randn(6, 9, dtype=F64)
    dx, dA, dB = torch.autograd.grad(noisy, (x, pair.A, pair.B), g)
    torch.testing.assert_close(dx, g @ (W + E))
    torch.testing.assert_close(dB, pair.scale * g.T @ pair.A.detach().T)
    torch.testing.assert_close(dA, pair.scale * pair.B.detach().T @ g.T)


def test_every_step_draws_anew_and_evaluation_never() -> None:
    model, _, run = site_alone()
    x = torch.randn(5, 6, dtype=F64)

    def step() -> Tensor:
        y = model.train()(x)
        y.square().sum().backward()
        run.step()
        return y.detach()

    plain = model.eval()(x).detach()
    assert torch.equal(step(), plain), "nothing is known before the first gradient"
    second, third = step(), step()
    assert not torch.allclose(second, plain) and not torch.allclose(second, third)
    assert torch.equal(model.eval()(x), plain) and torch.equal(model(x), plain)
    with torch.no_grad():
        assert torch.equal(model.train()(x), plain)
    run.finish()
    assert torch.equal(model.train()(x), plain)


@pytest.mark.parametrize(
    "check", ["same_seed_same_run", "resumes", "accumulates", "works_with_checkpointing"]
)
def test_the_kit_in_the_form_ggpo(check: str) -> None:
    example = {"form": "ggpo", "sigma": 0.5, "kappa": 0.5}
    RULE_CHECKS[check](RuleCase(replace(METHOD, rule_example=example)))


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"form": "sam"}, {"rho": -1}, {"beta": 1.0}, {"limit": -0.1}):
        with pytest.raises(plait.PlaitError, match=f"lora-ggpo: {next(iter(wrong))}"):
            LoraGgpo(**wrong)
    model = make_stack()
    plait.attach(model, "lora", rank=2, targets="embeddings")
    with pytest.raises(plait.PlaitError, match="linear sites"):
        plait.RuleStack(model, [LoraGgpo(form="ggpo")])
    with pytest.raises(plait.PlaitError, match="each move the weights"):
        plait.RuleStack(model, [LoraGgpo(), LoraGgpo()])
