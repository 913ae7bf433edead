"""LaMDA and LaMDA++: the sandwich, a freezing that holds to the bit, and ranks by spectrum."""

import itertools
import math

import pytest
import torch
from rule_models import batches, make_stack, train
from torch import nn

import plait
import tiny
from plait.rules.lamda import Lamda
from plait.rules.lamda_plus_plus import SpectralRanks, energies


def linear(rank=4, dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 6)).to(dtype)
    adapter = plait.attach(model, "lamda", rank=rank, seed=2, **options)
    return model, adapter.deltas["0"], adapter


def adapted(rank=4, **options):
    model = make_stack()
    return model, plait.attach(model, "lamda", targets=["up", "down"], rank=rank, seed=0, **options)


def test_the_factors_are_the_leading_singular_triplets():
    model, delta, _ = linear(alpha=6.0)
    U, S, Vh = torch.linalg.svd(model[0].weight.detach())
    made = delta.scaling * delta.B @ delta.S @ delta.A
    torch.testing.assert_close(made.detach(), (U[:, :4] * S[:4]) @ Vh[:4])
    torch.testing.assert_close(delta.A @ delta.A.T, torch.eye(4).double())
    torch.testing.assert_close((delta.B.T @ delta.B).detach(), torch.eye(4).double())


@pytest.mark.parametrize("start", ["spectral", "zero"])
def test_either_start_is_the_base_and_moves_by_its_formula(start):
    model, delta, adapter = linear(start=start)
    assert not delta.dense().any()
    held = torch.zeros(6, 4).double() if start == "zero" else (delta.B @ delta.S).detach()
    tiny.scramble(adapter, 0.5)
    wanted = delta.scaling * (delta.B @ delta.S - held) @ delta.A
    torch.testing.assert_close(delta.dense(), wanted)
    assert delta.factors().rank == 4
    x, g = torch.randn(7, 9).double(), torch.randn(7, 6).double()
    model(x).backward(g)
    G = g.T @ x
    torch.testing.assert_close(delta.S.grad, delta.scaling * delta.B.T @ G @ delta.A.T)
    torch.testing.assert_close(delta.B.grad, delta.scaling * G @ delta.A.T @ delta.S.T)


def test_a_file_holds_what_is_held_back(tmp_path):
    for start, names in {"spectral": {"A", "B", "S", "H"}, "zero": {"A", "B", "S"}}.items():
        model, _, adapter = linear(start=start)
        tiny.scramble(adapter, 0.5)
        assert set(adapter.state_dict()) == {f"0.{n}" for n in names}
        x = torch.randn(3, 9).double()
        wanted = model(x)
        adapter.save(tmp_path / start)
        plait.detach(model)
        plait.load(model, tmp_path / start)
        torch.testing.assert_close(model(x), wanted)


def test_backward_keeps_no_input():
    model, _, _ = linear(dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(torch.randn(100, 9))
    assert max(shape.numel() for shape in kept) <= 4 * 100


def test_autocast_does_not_round_what_is_left_of_the_start():
    _, delta, adapter = linear(dtype=torch.float32)
    tiny.scramble(adapter, 1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = delta.factors().B
    torch.testing.assert_close(inside, delta.B @ delta.S - delta.H)


@pytest.mark.parametrize(("rank", "last"), [(4, 6), (5, 3), (32, 90), (3, 1)])
def test_the_schedule_is_the_papers(rank, last):
    model, _ = adapted()
    rule = Lamda(freeze_by=last)
    run = plait.RuleStack(model, [rule], lr=0.1, total_steps=100)
    for step in range(100):
        run.run.step = step
        wanted = math.ceil(round(rank * (1 - step / last), 9)) if step < last else 0
        assert rule.trainable(rank) == wanted


def test_a_frozen_column_never_moves_again_and_the_others_do():
    """Bit for bit, under momentum and weight decay."""
    model, adapter = adapted()
    rule = Lamda(freeze_by=6)
    run = plait.RuleStack(model, [rule], lr=1e-2, weight_decay=0.1, total_steps=20)
    before_A = {p: d.A.clone() for p, d in adapter.deltas.items()}
    for step, ids in enumerate(batches(10)):
        before = {p: d.B.detach().clone() for p, d in adapter.deltas.items()}
        moving = rule.trainable(4)
        train(model, run, [ids])
        assert moving == [4, 4, 3, 2, 2, 1, 0, 0, 0, 0][step]
        for path, delta in adapter.deltas.items():
            same = (before[path] == delta.B).all(0)
            assert same.tolist() == [True] * (4 - moving) + [False] * moving
    assert all(torch.equal(d.A, before_A[p]) for p, d in adapter.deltas.items())
    held = {id(p) for p in run.optimizer.state}
    for delta in adapter.deltas.values():
        assert id(delta.B) not in held and id(delta.S) in held


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped():
    data = batches(8)
    model, adapter = adapted()
    train(model, plait.RuleStack(model, [Lamda(freeze_by=6)], lr=1e-2, total_steps=8), data)
    other, again = adapted()
    first = plait.RuleStack(other, [Lamda(freeze_by=6)], lr=1e-2, total_steps=8)
    train(other, first, data[:3])
    second = plait.RuleStack(other, [Lamda(freeze_by=6)], lr=1e-2, total_steps=8)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    train(other, second, data[3:])
    for key, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])


def test_the_rule_wants_its_own_deltas_and_a_known_length():
    model, _ = adapted()
    with pytest.raises(plait.PlaitError, match="total_steps"):
        plait.RuleStack(model, ["lamda"])
    other = make_stack()
    plait.attach(other, "lora", targets=["up"])
    with pytest.raises(plait.PlaitError, match="attach method lamda"):
        plait.RuleStack(other, ["lamda"], total_steps=10)
    with pytest.raises(plait.PlaitError, match="shorter side"):
        linear(rank=7)


def spectra(*falls):
    """Square layers whose singular values fall by a factor each."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(12, 12) for _ in falls]).double()
    for layer, fall in zip(model, falls, strict=True):
        U, V = (torch.linalg.qr(torch.randn(12, 12).double()).Q for _ in range(2))
        with torch.no_grad():
            layer.weight.copy_(U @ torch.diag(fall ** torch.arange(12).double()) @ V.T)
    return model


def test_energy_is_the_share_of_the_frobenius_norm():
    W = torch.randn(9, 14)
    S = torch.linalg.svdvals(W.double()).square()
    wanted = torch.cat([torch.zeros(1).double(), S.cumsum(0) / S.sum()])
    torch.testing.assert_close(energies(W, 5), wanted[:6], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(energies(W, 50), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by", ["groups", "energy"])
def test_flat_spectra_get_more_rank_at_the_same_mean(by):
    falls = [0.5, 0.95, 0.7, 0.99, 0.6, 0.9, 0.3]
    model = spectra(*falls)
    start = SpectralRanks(by=by)
    adapter = plait.attach(model, "lamda-plus-plus", rank=4, initializer=start, seed=0)
    ranks = [d.rank for d in adapter.deltas.values()]
    assert sum(ranks) == 4 * len(falls) and set(ranks) <= {2, 4, 6} and len(set(ranks)) > 1
    if by == "groups":
        assert [r for _, r in sorted(zip(falls, ranks, strict=True))] == [2, 2, 4, 4, 4, 6, 6]
    else:
        E = [energies(d.site.weight().detach(), 6).tolist() for d in adapter.deltas.values()]
        held = lambda choice: sum(e[r] for e, r in zip(E, choice, strict=True))  # noqa: E731
        choices = itertools.product((2, 4, 6), repeat=len(falls))
        best = max(held(c) for c in choices if sum(c) == 4 * len(falls))
        assert held(ranks) == pytest.approx(best)
    assert len({d.scaling for d in adapter.deltas.values()}) == 1
    count = sum(adapter.method.count([d.site], d.options) for d in adapter.deltas.values())
    assert adapter.num_parameters() == count == sum(r * r + 12 * r for r in ranks)


def test_without_spread_it_is_lamda():
    model = spectra(0.5, 0.9, 0.7)
    start = SpectralRanks(spread=0.0)
    adapter = plait.attach(model, "lamda-plus-plus", rank=4, initializer=start)
    assert [d.rank for d in adapter.deltas.values()] == [4, 4, 4]
    assert SpectralRanks()._candidates(1) == (1, 1, 1)
    with pytest.raises(plait.PlaitError, match="do not fit"):
        plait.attach(spectra(0.5, 0.9, 0.7), "lamda-plus-plus", rank=10)
    with pytest.raises(plait.PlaitError, match="spread"):
        SpectralRanks(spread=1.0)


@pytest.mark.parametrize("method", ["lamda", "lamda-plus-plus"])
def test_training(method):
    model = tiny.llama()
    adapter = plait.attach(model, method, rank=8, seed=0)
    losses = tiny.losses(model, adapter)
    assert losses[-1] < 0.8 * losses[0]
