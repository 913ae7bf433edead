"""LoRA-Squeeze: every cut is the best approximation, and optimiser, scale and start survive it."""

from __future__ import annotations

import copy

import pytest
import torch
from rule_models import batches, make_stack, randomise, train

import plait
from plait.linalg import LowRank
from plait.rules._annealing import halvings, pooled
from plait.rules._squeeze import squeeze, squeezed
from plait.rules.lora_squeeze import LoraSqueeze
from plait.testing import make_model
from plait.testing.models import get_subject

WIDE = torch.float64


def adapted(rank: int = 6, **options):
    model = make_stack()
    options = {"rank": rank, "alpha": 9.0, "targets": ["up", "down"], "seed": 0, **options}
    return model, plait.attach(model, "lora", **options)


def stack_of(model, steps: int = 9, **options) -> plait.RuleStack:
    rule = LoraSqueeze(**{"target_rank": 2, **options})
    return plait.RuleStack(model, [rule], lr=1e-2, total_steps=steps, seed=0)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def ranks(adapter) -> list[int]:
    return [d.rank for d in adapter.deltas.values()]


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_it_is_the_truncated_svd_of_the_dense_change(batch: tuple[int, ...], k: int) -> None:
    low = LowRank(B=randn(*batch, 12, 5), A=randn(*batch, 5, 9, seed=1), scale=0.7)
    cut = squeezed(low, k)
    U, S, Vh = torch.linalg.svd(low.dense(), full_matrices=False)
    want = (U[..., :k] * S[..., None, :k]) @ Vh[..., :k, :]
    torch.testing.assert_close(0.7 * cut.B @ cut.A, want, rtol=1e-10, atol=1e-10)
    tail = S[..., k:].square().sum() / S.square().sum()
    assert cut.dropped == pytest.approx(float(tail), abs=1e-12)
    for gram in (cut.B.mT @ cut.B, cut.A @ cut.A.mT):
        torch.testing.assert_close(gram, torch.diag_embed(S[..., :k] / 0.7), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(low.B @ cut.P, cut.B, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cut.Q @ low.A, cut.A, rtol=1e-9, atol=1e-9)


def test_the_factors_do_not_depend_on_how_dw_was_factored() -> None:
    B, A, R = randn(12, 5), randn(5, 9, seed=1), randn(5, 5, seed=2)
    one = squeezed(LowRank(B, A, 0.7), 3)
    two = squeezed(LowRank(B @ R, torch.linalg.solve(R, A), 0.7), 3)
    torch.testing.assert_close(one.B, two.B, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(one.A, two.A, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("k", [2, 6])
def test_components_of_no_size_stay_out_of_dw_and_can_learn(k: int) -> None:
    A = randn(6, 9)
    cut = squeezed(LowRank(torch.zeros(12, 6, dtype=WIDE), A, 2.0), k)
    assert not cut.B.any() and cut.dropped == 0.0
    torch.testing.assert_close(cut.A.norm(dim=1), torch.full((k,), 3**-0.5, dtype=WIDE))
    B = randn(12, 1) @ randn(1, 6, seed=3)  # rank 1, held by six components
    cut = squeezed(LowRank(B, A, 2.0), k)
    torch.testing.assert_close(2.0 * cut.B @ cut.A, 2.0 * B @ A, rtol=1e-9, atol=1e-9)
    assert cut.A.any(1).all() and not cut.B[:, 1:].any() and torch.isfinite(cut.Q).all()
    table = squeezed(LowRank(randn(12, 6), torch.zeros(6, 9, dtype=WIDE)), k, table=True)
    assert not table.A.any() and table.B.any(0).all()


def test_moments_go_on_as_the_gradients_do() -> None:
    """m' is what the average of the past gradients would be, taken for the new factors."""
    model, adapter = adapted()
    randomise(adapter)
    delta = adapter.deltas["layers.1.up"]
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-3)
    (ids,) = batches(1)
    model(ids).backward()
    before = {n: delta.get_parameter(n).grad.clone() for n in "AB"}
    optimizer.step()
    with torch.no_grad():  # back to where that gradient was taken
        randomise(adapter)
    # At full rank dW, and with it its own gradient, does not move: only the factors do.
    squeeze(delta, 6, optimizer, project=True)
    for p in adapter.parameters():
        p.grad = None
    model(ids).backward()
    for name in "AB":
        p = delta.get_parameter(name)
        state = optimizer.state[p]
        assert not torch.allclose(p.grad, before[name])
        torch.testing.assert_close(state["exp_avg"], 0.1 * p.grad, rtol=1e-8, atol=1e-12)
        assert (state["exp_avg_sq"] > 0).all() and float(state["step"]) == 1
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in adapter.parameters())


def test_second_moments_take_the_squares_of_the_coefficients() -> None:
    _, adapter = adapted()
    randomise(adapter)
    delta = adapter.deltas["layers.0.up"]
    optimizer = torch.optim.Adam(adapter.parameters())
    v = {n: randn(*delta.get_parameter(n).shape).square() for n in "AB"}
    for n, value in v.items():
        p = delta.get_parameter(n)
        optimizer.state[p] = {"step": torch.tensor(4.0), "exp_avg": 0 * value, "exp_avg_sq": value}
    cut = squeezed(delta.trained(), 2)
    squeeze(delta, 2, optimizer, project=True)
    state = optimizer.state
    torch.testing.assert_close(state[delta.A]["exp_avg_sq"], (cut.P**2).T @ v["A"])
    torch.testing.assert_close(state[delta.B]["exp_avg_sq"], v["B"] @ (cut.Q**2).T)


def test_reset_begins_anew_and_an_unknown_state_does_too() -> None:
    model, adapter = adapted()
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-3)
    for ids in batches(2):
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    one, two, other = list(adapter.deltas.values())[:3]
    squeeze(one, 3, optimizer, project=False)
    optimizer.state[two.A]["mystery"] = torch.ones_like(two.A)
    squeeze(two, 3, optimizer, project=True)
    assert one.A not in optimizer.state and two.A not in optimizer.state
    assert two.B in optimizer.state and other.A in optimizer.state
    squeeze(other, 3, None, project=True)  # without an optimiser
    assert other.rank == 3


def test_the_loss_jumps_by_the_tail_energy() -> None:
    """White inputs and dW at the optimum: half the tail's energy, and nothing else."""
    layer = torch.nn.Linear(9, 12, bias=False, dtype=WIDE)
    model = torch.nn.Sequential(layer)
    adapter = plait.attach(model, "lora", rank=5, alpha=3.0, targets=["0"], seed=0)
    randomise(adapter)
    x, _ = torch.linalg.qr(randn(40, 9))
    delta = adapter.deltas["0"]
    S = torch.linalg.svdvals(delta.dense().detach())
    with torch.no_grad():
        y = model(x)
        for k in (4, 2):
            squeeze(delta, k, None, project=True)
            loss = 0.5 * (model(x) - y).square().sum()
            torch.testing.assert_close(loss, 0.5 * S[k:].square().sum(), rtol=1e-8, atol=1e-12)


def test_the_loss_jumps_by_the_gradient_along_the_tail_to_first_order() -> None:
    (ids,) = batches(1)
    errors = []
    for size in (1e-2, 1e-3):
        model, adapter = adapted()
        randomise(adapter)
        delta = adapter.deltas["layers.1.up"]
        U, S, Vh = torch.linalg.svd(delta.dense().detach(), full_matrices=False)
        S[3:6] = size * torch.tensor([3.0, 2.0, 1.0], dtype=WIDE)
        with torch.no_grad():
            root = (S[:6] / delta.scaling).sqrt()
            delta.set_pair(root[:, None] * Vh[:6], U[:, :6] * root)
        loss = model(ids)
        gradient_A = torch.autograd.grad(loss, delta.A)[0]
        # <G, B_k A_k> for the dropped components, from A's own gradient s B^T G
        predicted = -(gradient_A * delta.A)[3:].sum().detach()
        squeeze(delta, 3, None, project=True)
        errors.append(float((model(ids) - loss - predicted).detach().abs()))
        assert abs(float(predicted)) > 30 * errors[-1]
    assert errors[1] < 0.02 * errors[0]  # the rest is of second order: a hundredth


def test_ranks_halve_at_equal_intervals_and_dw_is_the_best_of_its_rank() -> None:
    assert halvings(64, 6) == [32, 16, 8, 6] and halvings(4, 4) == []
    model, adapter = adapted(rank=8, targets=["up"])
    run = stack_of(model, steps=9)
    seen, data = [], batches(9)
    for ids in data:
        train(model, run, [ids])
        seen.append(ranks(adapter)[0])
    assert seen == [8, 8, 4, 4, 4, 2, 2, 2, 2]
    assert len(set(ranks(adapter))) == 1
    for delta in adapter.deltas.values():
        assert delta.scaling == pytest.approx(9 / 8) and delta.options.rank == 2
        assert run.optimizer.state[delta.A]["exp_avg"].shape == delta.A.shape
    listed = [id(p) for g in run.optimizer.param_groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in adapter.parameters())
    history = run.rules[0].history
    assert [h["step"] for h in history] == [3, 6]
    run.finish()
    assert adapter.info["lora-squeeze"] == history
    assert run.rules[0].ranks_now() == {f"default/{p}": 2 for p in adapter.deltas}


@pytest.mark.parametrize("state", ["project", "reset"])
def test_a_cut_in_training_is_the_best_approximation(state: str) -> None:
    data = batches(4)
    model, adapter = adapted()
    train(model, plait.RuleStack(model, lr=1e-2), data)
    other, cut = adapted()
    run = stack_of(other, ranks=[3], at=[4], state=state)
    train(other, run, data)
    for path, delta in cut.deltas.items():
        want, dropped = adapter.deltas[path].trained().truncate(rank=3)
        torch.testing.assert_close(delta.dense(), want.dense(), rtol=1e-9, atol=1e-12)
        found = run.rules[0].history[0]["dropped_energy"][f"default/{path}"]
        assert found == pytest.approx(dropped, abs=1e-12)
        assert (delta.A in run.optimizer.state) == (state == "project")
    train(other, run, data)  # and training goes on
    assert all(torch.isfinite(p).all() for p in cut.parameters())


def test_a_rank_that_is_met_already_changes_nothing() -> None:
    data = batches(6)
    model, adapter = adapted(rank=2)
    train(model, stack_of(model), data)
    other, plain = adapted(rank=2)
    train(other, plait.RuleStack(other, lr=1e-2), data)
    for key, value in plain.state_dict().items():
        assert torch.equal(adapter.state_dict()[key], value)


def test_a_held_back_start_is_left_alone(tmp_path) -> None:
    model, adapter = adapted(rank=4, initializer="pissa")
    (ids,) = batches(1)
    base = make_stack()(ids)
    torch.testing.assert_close(model(ids), base)
    run = stack_of(model, ranks=[2], at=[3])
    data = batches(3)
    held = {p: d.held_B.clone() @ d.held_A for p, d in adapter.deltas.items()}
    train(model, run, data[:2])
    before = {
        p: LowRank(d.B.detach().clone(), d.A.detach().clone(), d.scaling)
        for p, d in adapter.deltas.items()
    }
    run.run.step = 3
    run.rules[0].after_step()
    for path, delta in adapter.deltas.items():
        want = before[path].truncate(rank=2)[0].dense() - 9 / 4 * held[path]
        torch.testing.assert_close(delta.dense(), want, rtol=1e-9, atol=1e-10)
        assert delta.rank == 2 and delta.factors().rank == 6
    adapter.save(tmp_path / "a")
    again = plait.load(make_stack(), tmp_path / "a")
    for path, delta in adapter.deltas.items():
        assert torch.equal(again.deltas[path].dense(), delta.dense())


def test_pooled_ranks_take_the_largest_singular_values_at_the_same_total(tmp_path) -> None:
    model, adapter = adapted()
    randomise(adapter)
    with torch.no_grad():
        for i, delta in enumerate(adapter.deltas.values()):
            delta.B.mul_(1.6**i)
    spectra = {p: torch.linalg.svdvals(d.dense().detach())[:6] for p, d in adapter.deltas.items()}
    run = stack_of(model, ranks=[3], at=[1], choose="pooled")
    before = {p: d.dense().detach() for p, d in adapter.deltas.items()}
    run.run.step = 1
    run.rules[0].after_step()
    found = dict(zip(adapter.deltas, ranks(adapter), strict=True))
    assert sum(found.values()) == 24 and min(found.values()) == 1 < max(found.values())
    rest = torch.cat([S[1:] for S in spectra.values()]).sort(descending=True).values
    floor = rest[24 - 8 - 1]
    assert found == {p: 1 + int((S[1:] >= floor).sum()) for p, S in spectra.items()}
    even = sum(S[3:].square().sum() for S in spectra.values())
    lost = sum((before[p] - d.dense()).square().sum() for p, d in adapter.deltas.items())
    assert float(lost) < float(even)
    adapter.save(tmp_path / "a")
    again = plait.load(make_stack(), tmp_path / "a")
    adapter.save(tmp_path / "p", format="peft")
    from_peft = plait.load(make_stack(), tmp_path / "p")
    for path, delta in adapter.deltas.items():
        assert again.deltas[path].rank == delta.rank
        assert torch.equal(again.deltas[path].dense(), delta.dense())
        torch.testing.assert_close(from_peft.deltas[path].dense(), delta.dense())


def test_pooled_never_spends_more_than_there_is() -> None:
    spectra = {"a": torch.tensor([9.0]), "b": torch.tensor([3.0, 2.0, 1.0])}
    assert pooled(spectra, 2) == {"a": 1, "b": 3}
    assert pooled(spectra, 1) == {"a": 1, "b": 1}


def test_energy_keeps_as_few_as_hold_their_share() -> None:
    model, adapter = adapted()
    spectra = [[1, 0, 0, 0, 0, 0], [3, 2, 1, 0.5, 0, 0], [1, 1, 1, 1, 1, 1]]
    for delta, S in zip(adapter.deltas.values(), spectra, strict=False):
        low = LowRank.from_svd(
            torch.linalg.qr(randn(12, 6))[0][: delta.site.shape[0]],
            torch.tensor(S, dtype=WIDE) / delta.scaling,
            torch.linalg.qr(randn(12, 6))[0].T[:, : delta.site.shape[1]],
        )
        delta.set_pair(low.A, low.B)
    own = [torch.linalg.svdvals(d.dense().detach())[:6] for d in adapter.deltas.values()]
    run = stack_of(model, ranks=[4], at=[1], choose="energy", energy=0.9)
    run.run.step = 1
    run.rules[0].after_step()
    for k, S in zip(ranks(adapter), own, strict=True):
        share = S.square().cumsum(0) / S.square().sum().clamp_min(1e-30)
        wanted = int((share < 0.9).sum()) + 1 if S.any() else 1
        assert k == min(4, wanted)
    assert ranks(adapter)[0] == 1


def test_packed_experts_are_cut_expert_by_expert() -> None:
    model = make_model("parameter")
    adapter = plait.attach(model, "lora", rank=4, seed=1, targets=get_subject("parameter").targets)
    delta = next(iter(adapter.deltas.values()))
    with torch.no_grad():
        delta.B.normal_()
    optimizer = torch.optim.Adam(adapter.parameters())
    delta.dense().square().sum().backward()
    optimizer.step()
    before = delta.dense().detach()
    squeeze(delta, 2, optimizer, project=True)
    U, S, Vh = torch.linalg.svd(before, full_matrices=False)
    want = (U[..., :2] * S[..., None, :2]) @ Vh[..., :2, :]
    torch.testing.assert_close(delta.dense().detach(), want, rtol=1e-4, atol=1e-5)
    assert optimizer.state[delta.B]["exp_avg"].shape == delta.B.shape


def test_the_rate_eases_in_after_a_cut_and_the_scheduler_keeps_its_own() -> None:
    model, _ = adapted(rank=4)
    run = stack_of(model, ranks=[2], at=[2], rewarm=3)
    used: list[float] = []
    step = run.optimizer.step
    run.optimizer.step = lambda: (used.append(run.optimizer.param_groups[0]["lr"]), step())
    for ids in batches(7):
        train(model, run, [ids])
        assert run.optimizer.param_groups[0]["lr"] == 1e-2
    assert used == pytest.approx([1e-2, 1e-2, 2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2])


def test_the_plan_of_a_resumed_run_is_the_first_one() -> None:
    model, adapter = adapted(rank=8)
    run = stack_of(model)
    train(model, run, batches(4))
    saved = copy.deepcopy(run.state_dict())
    assert ranks(adapter)[0] == 4
    again = stack_of(model)
    assert again.rules[0]._plan == [[4, 2]]  # what a rank of 4 alone would suggest
    again.load_state_dict(saved)
    assert again.rules[0]._plan == [[3, 4], [6, 2]]
    assert again.rules[0].history == run.rules[0].history


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({"target_rank": 7}, 9, "own rank, 6"),
        ({"target_rank": 0}, 9, "at least 1"),
        ({"ranks": [2, 4]}, 9, "must fall"),
        ({"ranks": [4, 2], "at": [3]}, 9, "2 cuts need as many"),
        ({"ranks": [4, 2], "at": [3, 3]}, 9, "rising steps"),
        ({"at": [3]}, 9, "give both"),
        ({}, None, "need total_steps"),
        ({}, 2, "rising steps"),
        ({"energy": 1.5}, 9, "energy lies in"),
        ({"choose": "best"}, 9, "use one of uniform, pooled, energy"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, steps, message) -> None:
    model, _ = adapted(rank=6)
    with pytest.raises(plait.PlaitError, match=message):
        stack_of(model, steps, **options)


def test_pairs_that_are_not_dw_are_refused() -> None:
    model = make_stack()
    plait.attach(model, "kasa", rank=4, targets=["up"], seed=0)
    with pytest.raises(plait.PlaitError, match="use a method such as lora"):
        plait.RuleStack(model, [LoraSqueeze()], total_steps=9)
    model = make_stack()
    plait.attach(model, "sora", rank=4, targets=["up"], seed=0)
    with pytest.raises(plait.PlaitError, match="each change ranks during training"):
        plait.RuleStack(model, ["sora", "lora-squeeze"], total_steps=9)
