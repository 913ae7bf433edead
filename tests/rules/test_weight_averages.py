"""EMA and LAWA against averages written out over the whole history of a run."""

from __future__ import annotations

import copy

import pytest
import torch
from rule_models import batches, make_stack, randomise, train
from torch import Tensor

import plait
from plait.rules._average import interpolate
from plait.rules.ema import Ema
from plait.rules.lawa import Lawa

History = list[dict[str, Tensor]]


def make(rules, dtype=torch.float64, steps: int = 10, adapter_dtype=None, lr: float = 1e-2):
    model = make_stack(dtype=dtype)
    adapter = plait.attach(
        model, "lora", rank=3, alpha=6, targets="all-linear", seed=0, dtype=adapter_dtype
    )
    return model, adapter, plait.RuleStack(model, rules, lr=lr, total_steps=steps)


def history_of(rule, steps: int = 10, **how) -> tuple[History, plait.Adapter]:
    """Every state after a step, and the adapter (unfinished)."""
    model, adapter, run = make([rule], steps=steps, **how)
    found = []
    for ids in batches(steps):
        train(model, run, [ids])
        found.append({n: p.detach().clone() for n, p in adapter.named_parameters()})
    return found, adapter


def mean(states: History, weights: list[float]) -> dict[str, Tensor]:
    return {n: sum(w * s[n] for w, s in zip(weights, states, strict=True)) for n in states[0]}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=tolerance, rtol=0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.8, 1.0])
def test_ema_weighs_the_history_as_its_formula_says(decay: float) -> None:
    rule = Ema(decay=decay)
    states, _ = history_of(rule)
    weights: list[float] = []
    for n in range(1, 11):
        kept = min(1 - 1 / n, decay)
        weights = [kept * w for w in weights] + [1 - kept]
    assert sum(weights) == pytest.approx(1)
    close(rule.average(), mean(states, weights))


def test_a_decay_of_one_is_the_mean_and_of_zero_the_last_step() -> None:
    plain, last = Ema(decay=1.0, start=4, every=2), Ema(decay=0.0)
    states, _ = history_of(plain)
    close(plain.average(), mean([states[5], states[7], states[9]], [1 / 3] * 3))
    states, _ = history_of(last)
    for name, value in states[-1].items():
        assert torch.equal(last.average()[name], value)


def test_start_may_be_a_share_of_the_run() -> None:
    rule = Ema(decay=1.0, start=0.8)
    states, _ = history_of(rule)
    close(rule.average(), mean(states[8:], [0.5, 0.5]))


def test_lawa_is_the_mean_of_the_last_checkpoints() -> None:
    rule = Lawa(last=3, every=2)
    states, _ = history_of(rule)
    close(rule.average(), mean([states[5], states[7], states[9]], [1 / 3] * 3))
    share = Lawa(last=2, every=0.3)
    states, _ = history_of(share)
    close(share.average(), mean([states[5], states[8]], [0.5, 0.5]))


@pytest.mark.parametrize("rule", [Ema(decay=0.8), Lawa(last=3, every=1)])
def test_training_itself_is_as_without_the_rule(rule) -> None:
    states, _ = history_of(rule)
    model, adapter, run = make([])
    train(model, run, batches(10))
    for name, p in adapter.named_parameters():
        assert torch.equal(states[-1][name], p)


@pytest.mark.parametrize("make_rule", [lambda u: Ema(decay=0.8, use=u), lambda u: Lawa(3, 1, u)])
def test_the_average_lands_in_the_adapter_or_stays_beside_it(make_rule) -> None:
    for use in ("at_finish", "keep"):
        rule = make_rule(use)
        model, adapter, run = make([rule])
        train(model, run, batches(6))
        own = {n: p.detach().clone() for n, p in adapter.named_parameters()}
        average = rule.average()
        (ids,) = batches(1)
        plain = model(ids)
        with rule.averaged():
            averaged = model(ids)
        assert torch.equal(model(ids), plain) and not torch.equal(averaged, plain)
        run.finish()
        for name, p in adapter.named_parameters():
            assert torch.equal(p, average[name] if use == "at_finish" else own[name])
        adapter.load_state_dict(average)
        torch.testing.assert_close(model(ids), averaged, atol=1e-12, rtol=0)


def test_half_precision_is_averaged_in_float32() -> None:
    """Steps of a tenth of bfloat16's spacing would all be lost in an average of that dtype."""
    rule = Ema(decay=0.999)
    model, adapter, run = make([rule], dtype=torch.bfloat16, adapter_dtype=torch.bfloat16, lr=0.0)
    train(model, run, batches(1))
    start = {n: p.detach().float() for n, p in adapter.named_parameters()}
    rule._count = 10**6
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(p + 1.0)
    moved = {n: p.detach().float() for n, p in adapter.named_parameters()}
    for _ in range(5):
        run.step()
    for name, value in rule.average().items():
        assert value.dtype == torch.float32
        want = moved[name] + 0.999**5 * (start[name] - moved[name])
        torch.testing.assert_close(value, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make_rule", [lambda: Ema(decay=0.8), lambda: Lawa(3, 2)])
def test_resuming_gives_the_same_average(make_rule) -> None:
    whole = make_rule()
    history_of(whole)
    model, early, run = make([make_rule()])
    train(model, run, batches(10)[:5])
    saved = copy.deepcopy([early.state_dict(), run.optimizer.state_dict(), run.state_dict()])
    rule = make_rule()
    model, late, run = make([rule])
    late.load_state_dict(saved[0])
    run.optimizer.load_state_dict(saved[1])
    run.load_state_dict(saved[2])
    train(model, run, batches(10)[5:])
    for name, value in whole.average().items():
        assert torch.equal(rule.average()[name], value)


def test_a_mean_of_noisy_steps_ends_nearer_the_minimum() -> None:
    """Polyak's averaging where it is known to help: gradient descent on a quadratic with noise."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 4, bias=False)).double()
    adapter = plait.attach(model, "lora", rank=4, targets="all-linear", seed=0)
    target = 0.3 * torch.randn(4, 5, generator=torch.Generator().manual_seed(3)).double()
    rule = Ema(decay=1.0, start=0.5)
    run = plait.RuleStack(
        model, [rule], lr=0.05, total_steps=400, optimizer_factory=torch.optim.SGD
    )
    g = torch.Generator().manual_seed(4)
    delta = adapter.deltas["0"]
    start = float((delta.dense() - target).detach().norm())
    for _ in range(400):
        noise = 0.5 * torch.randn(4, 5, generator=g).double()
        (0.5 * (delta.dense() - target - noise).square().sum()).backward()
        run.step()
    last = float((delta.dense() - target).detach().norm())
    run.finish()
    averaged = float((delta.dense() - target).detach().norm())
    assert averaged < 0.5 * last < start


def test_interpolating_factors_is_not_interpolating_deltas() -> None:
    states = []
    for seed in (1, 2):
        _, adapter, _ = make([])
        randomise(adapter, seed)
        states.append(copy.deepcopy(adapter.state_dict()))
    dense = [s["layers.0.up.B"] @ s["layers.0.up.A"] for s in states]
    for share in (0.0, 0.3, 1.0):
        by_factor = interpolate(*states, share)
        by_delta = interpolate(*states, share, space="delta")
        torch.testing.assert_close(
            by_factor["layers.0.up.A"],
            (1 - share) * states[0]["layers.0.up.A"] + share * states[1]["layers.0.up.A"],
        )
        found = [s["layers.0.up.B"] @ s["layers.0.up.A"] for s in (by_factor, by_delta)]
        want = (1 - share) * dense[0] + share * dense[1]
        torch.testing.assert_close(found[1], want)
        same = torch.allclose(found[0], want, atol=1e-6)
        assert same == (share in (0.0, 1.0))
    with pytest.raises(plait.PlaitError, match=r"only one.*layers"):
        interpolate(states[0], dict(list(states[1].items())[1:]), 0.5)


def test_delta_space_is_what_two_active_adapters_answer() -> None:
    model = make_stack()
    found = []
    for name in ("a", "b"):
        adapter = plait.attach(model, "lora", name=name, rank=3, targets="all-linear", seed=0)
        randomise(adapter, ord(name))
        found.append(copy.deepcopy(adapter.state_dict()))
    (ids,) = batches(1)
    plait.activate(model, {"a": 0.7, "b": 0.3})
    both = model(ids)
    other = make_stack()
    joint = plait.attach(other, "lora", rank=6, targets="all-linear", seed=0)
    joint.load_state_dict(interpolate(*found, 0.3, space="delta"))
    torch.testing.assert_close(other(ids), both)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(plait.PlaitError, match="decay"):
        Ema(decay=1.5)
    with pytest.raises(plait.PlaitError, match="at_finish, keep"):
        Lawa(use="later")
    rule = Ema(start=5)
    model, _, run = make([rule])
    train(model, run, batches(2))
    with pytest.raises(plait.PlaitError, match="no average at step 2"):
        rule.average()
    with pytest.raises(plait.PlaitError, match="unknown adapter 'other'"):
        rule.average("other")
    model = make_stack()
    plait.attach(model, "adalora", rank=4, targets="all-linear")
    with pytest.raises(plait.PlaitError, match="ranks"):
        plait.RuleStack(model, ["ema"], total_steps=10)
