"""LoRA-Pro: the closed forms against numerical minimisers, and the three forms of the rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_models import batches, make_stack, randomise, train
from torch import Tensor

import plait
from plait.rules.lora_pro import LoraPro, adjusted_gradients, equivalent_gradient

S = 1.7
FREE = ("zero", "symmetric", "sylvester")


def problem(m: int = 9, n: int = 7, r: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    """g, A, B and the plain gradients of a linear loss <g, s B A>, all float64."""
    gen = torch.Generator().manual_seed(seed)
    g, A, B = (
        torch.randn(*s, generator=gen, dtype=torch.float64) for s in ((m, n), (r, n), (m, r))
    )
    return g, A, B, S * B.T @ g, S * g @ A.T


def projection(X: Tensor) -> Tensor:
    return X @ torch.linalg.pinv(X)


@pytest.mark.parametrize("free", FREE)
def test_equivalent_gradient_is_the_projection_whatever_x(free: str) -> None:
    g, A, B, GA, GB = problem()
    g_A, g_B = adjusted_gradients(GA, GB, A, B, S, free, 0)
    PB, PA = projection(B), projection(A.T)
    want = PB @ g + (torch.eye(9, dtype=g.dtype) - PB) @ g @ PA
    torch.testing.assert_close(equivalent_gradient(g_A, g_B, A, B, S), want, atol=1e-9, rtol=0)


@settings(max_examples=20, deadline=None)
@given(m=st.integers(4, 9), n=st.integers(4, 9), r=st.integers(1, 3), seed=st.integers(0, 99))
def test_no_numerical_minimiser_comes_closer_to_the_full_gradient(
    m: int, n: int, r: int, seed: int
) -> None:
    g, A, B, GA, GB = problem(m, n, r, seed)
    ours = equivalent_gradient(*adjusted_gradients(GA, GB, A, B, S, damping=0), A, B, S)
    # Least squares over all (g_A, g_B): vec(s g_B A + s B g_A) = M x, without the closed form.
    M = torch.cat(
        [
            S
            * torch.kron(
                torch.eye(m, dtype=g.dtype), A.T.clone(memory_format=torch.contiguous_format)
            ),
            S * torch.kron(B, torch.eye(n, dtype=g.dtype)),
        ],
        dim=1,
    )
    x = torch.linalg.lstsq(M, g.flatten()[:, None], driver="gelsd").solution
    best = (M @ x).reshape(m, n)
    torch.testing.assert_close((ours - g).norm(), (best - g).norm(), atol=1e-8, rtol=1e-8)


def test_closer_than_any_multiple_of_the_plain_step() -> None:
    g, A, B, GA, GB = problem()
    ours = equivalent_gradient(*adjusted_gradients(GA, GB, A, B, S), A, B, S)
    plain = equivalent_gradient(GA, GB, A, B, S)
    best_multiple = (plain * g).sum() / plain.square().sum()
    assert (ours - g).norm() < (best_multiple * plain - g).norm()


def test_sylvester_x_is_the_nearest_to_the_plain_gradients() -> None:
    _, A, B, GA, GB = problem()
    near = adjusted_gradients(GA, GB, A, B, S, "sylvester", 0)
    distance = lambda a, b: float((a - GA).square().sum() + (b - GB).square().sum())  # noqa: E731
    least = distance(*near)
    gen = torch.Generator().manual_seed(5)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            D = size * torch.randn(3, 3, generator=gen, dtype=torch.float64)
            assert distance(near[0] + D @ A, near[1] - B @ D) > least
    for other in ("zero", "symmetric"):
        assert distance(*adjusted_gradients(GA, GB, A, B, S, other, 0)) >= least


def test_symmetric_x_lets_both_carry_the_common_part_alike() -> None:
    g, A, B, GA, GB = problem()
    g_A, g_B = adjusted_gradients(GA, GB, A, B, S, "symmetric", 0)
    PB, PA = projection(B), projection(A.T)
    common = PB @ g @ PA
    torch.testing.assert_close(PB @ (S * g_B @ A) @ PA, common / 2, atol=1e-9, rtol=0)
    torch.testing.assert_close(PB @ (S * B @ g_A) @ PA, common / 2, atol=1e-9, rtol=0)


@pytest.mark.parametrize("free", FREE)
def test_the_loss_falls_by_the_squared_norm_of_the_equivalent_gradient(free: str) -> None:
    _, A, B, GA, GB = problem()
    g_A, g_B = adjusted_gradients(GA, GB, A, B, S, free, 0)
    slope = (GA * g_A).sum() + (GB * g_B).sum()
    norm = equivalent_gradient(g_A, g_B, A, B, S).square().sum()
    torch.testing.assert_close(slope, norm, atol=1e-9, rtol=1e-10)


def test_invariant_under_a_change_of_gauge() -> None:
    g, A, B, GA, GB = problem()
    R = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    A2, B2 = torch.linalg.inv(R) @ A, B @ R
    first = equivalent_gradient(*adjusted_gradients(GA, GB, A, B, S, damping=0), A, B, S)
    moved = adjusted_gradients(S * B2.T @ g, S * g @ A2.T, A2, B2, S, damping=0)
    torch.testing.assert_close(first, equivalent_gradient(*moved, A2, B2, S), atol=1e-9, rtol=0)


def test_full_rank_follows_the_full_gradient() -> None:
    g, A, B, GA, GB = problem(m=6, n=8, r=6)
    ours = equivalent_gradient(*adjusted_gradients(GA, GB, A, B, S, damping=0), A, B, S)
    torch.testing.assert_close(ours, g, atol=1e-8, rtol=0)


def test_a_frozen_factor_leaves_the_best_projection_of_the_other() -> None:
    g, A, B, GA, GB = problem()
    none, g_B = adjusted_gradients(None, GB, A, B, S, damping=0)
    assert none is None
    want = GB @ torch.linalg.inv(A @ A.T) / S**2
    torch.testing.assert_close(g_B, want, atol=1e-10, rtol=0)
    torch.testing.assert_close(S * g_B @ A, g @ projection(A.T), atol=1e-9, rtol=0)
    g_A, none = adjusted_gradients(GA, None, A, B, S, damping=0)
    torch.testing.assert_close(S * B @ g_A, projection(B) @ g, atol=1e-9, rtol=0)


def test_the_start_with_b_zero_moves_b_only() -> None:
    _, A, B, _, GB = problem()
    zero = torch.zeros_like(B)
    g_A, g_B = adjusted_gradients(torch.zeros_like(A), GB, A, zero, S)
    assert not g_A.any()
    torch.testing.assert_close(g_B, GB @ torch.linalg.inv(A @ A.T) / S**2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("free", FREE)
def test_a_tiny_b_gives_finite_steps_in_float32(free: str) -> None:
    g, A, B, _, GB = (t.float() for t in problem())
    tiny = 1e-12 * B
    g_A, g_B = adjusted_gradients(S * tiny.T @ g, GB, A, tiny, S, free)
    assert torch.isfinite(g_A).all() and torch.isfinite(g_B).all()
    moved = equivalent_gradient(g_A, g_B, A, tiny, S)
    assert moved.norm() <= 1.01 * g.norm()  # a projection never grows


def lora_model(method_seed: int = 0, rank: int = 3):
    model = make_stack()
    adapter = plait.attach(
        model, "lora", rank=rank, alpha=6, targets="all-linear", seed=method_seed
    )
    return model, adapter


def dense_gradients(model, adapter, ids) -> dict[str, Tensor]:
    """dL/dW of the base weights, by autograd on the dense weights."""
    weights = {path: d.site.base.weight for path, d in adapter.deltas.items()}
    for w in weights.values():
        w.requires_grad_(True)
    found = torch.autograd.grad(model(ids), list(weights.values()))
    for w in weights.values():
        w.requires_grad_(False)
    return dict(zip(weights, found, strict=True))


def test_sgd_form_moves_the_weights_by_the_projected_full_gradient() -> None:
    model, adapter = lora_model()
    randomise(adapter)
    (ids,) = batches(1)
    full = dense_gradients(model, adapter, ids)
    before = {p: (d.A.detach().clone(), d.B.detach().clone()) for p, d in adapter.deltas.items()}
    was = {p: d.dense().detach().clone() for p, d in adapter.deltas.items()}
    lr = 1e-7
    train(model, plait.RuleStack(model, [LoraPro(moments="none")], lr=lr), [ids])
    for path, delta in adapter.deltas.items():
        A, B = before[path]
        PB, PA = projection(B), projection(A.T)
        want = PB @ full[path] + (torch.eye(len(PB), dtype=PB.dtype) - PB) @ full[path] @ PA
        moved = (was[path] - delta.dense().detach()) / lr
        torch.testing.assert_close(moved, want, atol=1e-5 * float(want.norm()), rtol=0)


def test_full_form_is_adam_on_the_equivalent_gradient() -> None:
    """Two steps of one site against the recipe of the paper written out for that site alone."""
    model, adapter = lora_model()
    randomise(adapter)
    path, lr, betas, eps = "layers.1.up", 1e-3, (0.9, 0.999), 1e-8
    delta = adapter.deltas[path]
    A, B, s = delta.A.detach().clone(), delta.B.detach().clone(), delta.scaling
    M, V = (torch.zeros(delta.dense().shape, dtype=torch.float64) for _ in range(2))
    rule = LoraPro(moments="full", betas=betas, eps=eps)
    run = plait.RuleStack(model, [rule], lr=lr, weight_decay=0.1)
    for t, ids in enumerate(batches(2), 1):
        g = dense_gradients(model, adapter, ids)[path]
        E = equivalent_gradient(
            *adjusted_gradients(s * B.T @ g, s * g @ A.T, A, B, s, "zero"), A, B, s
        )
        M, V = betas[0] * M + (1 - betas[0]) * E, betas[1] * V + (1 - betas[1]) * E * E
        N = (M / (1 - betas[0] ** t)) / ((V / (1 - betas[1] ** t)).sqrt() + eps)
        g_A, g_B = adjusted_gradients(s * B.T @ N, s * N @ A.T, A, B, s)
        A, B = (1 - lr * 0.1) * A - lr * g_A, (1 - lr * 0.1) * B - lr * g_B
        train(model, run, [ids])
        torch.testing.assert_close(delta.A.detach(), A, atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(delta.B.detach(), B, atol=1e-9, rtol=1e-7)


def test_low_rank_moments_are_adamw_on_the_adjusted_gradients() -> None:
    model, adapter = lora_model()
    randomise(adapter)
    delta = adapter.deltas["layers.0.down"]
    A, B = (torch.nn.Parameter(t.detach().clone()) for t in (delta.A, delta.B))
    reference = torch.optim.AdamW([A, B], lr=1e-2, weight_decay=0.0)
    run = plait.RuleStack(model, ["lora-pro"], lr=1e-2)
    for ids in batches(3):
        g = dense_gradients(model, adapter, ids)["layers.0.down"]
        s = delta.scaling
        A.grad, B.grad = adjusted_gradients(
            s * B.detach().T @ g, s * g @ A.detach().T, A.detach(), B.detach(), s
        )
        reference.step()
        train(model, run, [ids])
        torch.testing.assert_close(delta.A.detach(), A.detach(), atol=1e-8, rtol=1e-6)
        torch.testing.assert_close(delta.B.detach(), B.detach(), atol=1e-8, rtol=1e-6)


def test_sgd_form_tracks_full_training_better_than_lora() -> None:
    """Twenty small steps: the loss of full SGD, of LoRA-Pro and of plain LoRA on the same batch."""
    (ids,) = batches(1)

    def losses(rules, lr: float) -> Tensor:
        model, _ = lora_model(rank=4)
        run = plait.RuleStack(model, rules, lr=lr, optimizer_factory=torch.optim.SGD)
        return torch.tensor(train(model, run, [ids] * 20))

    model, adapter = lora_model()
    weights = [d.site.base.weight for d in adapter.deltas.values()]
    full = []
    for _ in range(20):
        for w in weights:
            w.requires_grad_(True)
        loss = model(ids)
        full.append(float(loss.detach()))
        for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            w.requires_grad_(False)
            w -= 0.02 * g
    pro = losses([LoraPro(moments="none")], 0.02)
    plain = losses([], 0.02)
    want = torch.tensor(full)
    assert (pro - want).abs().max() < 0.05 * (want[0] - want[-1]).abs()
    assert (pro - want).abs().max() < (plain - want).abs().max()


@pytest.mark.parametrize("moments", ["lowrank", "full", "none"])
def test_resuming_gives_the_same_trajectory(moments: str) -> None:
    data = batches(6)
    model, adapter = lora_model()
    whole = plait.RuleStack(model, [LoraPro(moments=moments)], lr=1e-3)
    train(model, whole, data)

    first, early = lora_model()
    run = plait.RuleStack(first, [LoraPro(moments=moments)], lr=1e-3)
    train(first, run, data[:3])
    saved = (early.state_dict(), run.optimizer.state_dict(), run.state_dict())
    second, late = lora_model()
    late.load_state_dict(saved[0])
    run = plait.RuleStack(second, [LoraPro(moments=moments)], lr=1e-3)
    run.optimizer.load_state_dict(saved[1])
    run.load_state_dict(saved[2])
    train(second, run, data[3:])
    for key, value in adapter.state_dict().items():
        assert torch.equal(late.state_dict()[key], value)


def test_batching_over_equal_shapes_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for limit in (2**26, 1):
        monkeypatch.setattr("plait.rules.lora_pro._CHUNK", limit)
        model, adapter = lora_model()
        train(model, plait.RuleStack(model, [LoraPro(moments="full")], lr=1e-3), batches(3))
        ends.append(adapter.state_dict())
    for key in ends[0]:
        torch.testing.assert_close(ends[0][key], ends[1][key], atol=1e-12, rtol=1e-10)


def test_a_method_without_pairs_is_refused() -> None:
    model = make_stack()
    plait.attach(model, "increlora", seed=0)
    with pytest.raises(plait.PlaitError, match="pairs"):
        plait.RuleStack(model, ["lora-pro"], total_steps=10)


def test_an_unknown_form_is_refused_by_name() -> None:
    with pytest.raises(plait.PlaitError, match="lowrank, full, none"):
        LoraPro(moments="big")
