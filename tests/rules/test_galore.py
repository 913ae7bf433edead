"""GaLore: subspaces, what a period can change, the state's size, and the inner steps' oracles."""

from __future__ import annotations

import io

import pytest
import torch
from rule_models import batches, make_stack, train
from torch import nn

import plait
from plait.rules._base_weights import base_parameters
from plait.rules._galore_inner import Adafactor, Adam, Adam8bit
from plait.rules._galore_optimizer import GaLoreOptimizer, Projection
from plait.rules._subspace import Subspace, leading_subspace
from plait.rules.galore import Galore

SIDES = ("std", "reverse_std", "left", "right", "full")
SHAPES = ((9, 14), (14, 9), (10, 10))


class PlainStep:
    """No state: what is left is the projection."""

    def direction(self, state, gradient):
        return gradient

    def turn(self, state, turn) -> None: ...


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weight(*shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(randn(*shape, seed=99, dtype=dtype))


def optimizer_of(p: nn.Parameter, inner=None, lr: float = 0.1, decay: float = 0.0, **how):
    how = {"scale": 1.0, "svd": "full", **how}
    group = {"params": [p], "projected": True}
    return GaLoreOptimizer([group], lr, decay, projection=Projection(**how), inner=inner)


def walk(optimizer, p: nn.Parameter, gradients) -> list[torch.Tensor]:
    """The weight before the first step and after every one."""
    seen = [p.detach().clone()]
    for gradient in gradients:
        p.grad = gradient.to(p.dtype)
        optimizer.step()
        seen.append(p.detach().clone())
    return seen


def gradients(count: int, *shape: int) -> list[torch.Tensor]:
    return [randn(*shape, seed=i) for i in range(count)]


# -- subspaces ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("svd", ["full", "randomised"])
def test_bases_are_orthonormal_and_stand_on_the_sides_asked_for(side, shape, svd) -> None:
    space = leading_subspace(randn(*shape), 4, side, svd, torch.Generator().manual_seed(0))
    m, n = shape
    want = {
        "std": "left" if m < n else "right",
        "reverse_std": "right" if m < n else "left",
        "full": "left right",
    }.get(side, side)
    assert " ".join(k for k in ("left", "right") if getattr(space, k) is not None) == want
    eye = torch.eye(4, dtype=torch.float64)
    if space.left is not None:
        assert space.left.shape == (m, 4)
        torch.testing.assert_close(space.left.T @ space.left, eye, atol=1e-10, rtol=0)
    if space.right is not None:
        assert space.right.shape == (4, n)
        torch.testing.assert_close(space.right @ space.right.T, eye, atol=1e-10, rtol=0)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_comes_back_is_the_best_approximation_of_its_rank(side, shape) -> None:
    """Eckart-Young at a refresh, whichever side is projected."""
    G = randn(*shape)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    space = leading_subspace(G, 3, side, "full")
    torch.testing.assert_close(space.back(space.project(G)), best, atol=1e-9, rtol=0)


def test_the_sketch_is_as_good_where_the_spectrum_decays() -> None:
    U, V = (torch.linalg.qr(randn(80, 80, seed=s)).Q for s in (1, 2))
    G = (U * 0.7 ** torch.arange(80, dtype=torch.float64)) @ V.T
    best = 0.7 ** (2 * torch.arange(12, 80, dtype=torch.float64))
    space = leading_subspace(G, 12, "std", "randomised", torch.Generator().manual_seed(0))
    lost = (G - space.back(space.project(G))).norm()
    assert lost < 1.0001 * best.sum().sqrt()


@pytest.mark.parametrize(("rank", "side"), [(9, "std"), (14, "full"), (30, "reverse_std")])
def test_a_side_no_longer_than_the_rank_needs_no_basis(rank: int, side: str) -> None:
    space = leading_subspace(randn(9, 14), rank, side)
    assert space == Subspace(None, None)


# -- full rank ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_with_plain_steps_is_sgd(shape) -> None:
    """With the rank's identity basis, and with any other orthonormal one."""
    p, q = weight(*shape), weight(*shape)
    seen = walk(optimizer_of(p, PlainStep(), decay=0.1, rank=14), p, gradients(4, *shape))
    sgd = torch.optim.SGD([q], lr=0.1, weight_decay=0.1)
    assert torch.allclose(seen[-1], walk(sgd, q, gradients(4, *shape))[-1], atol=1e-12)
    m, n = shape
    turned = Subspace(
        torch.linalg.qr(randn(m, m, seed=5)).Q, torch.linalg.qr(randn(n, n, seed=6)).Q
    )
    G = randn(*shape)
    torch.testing.assert_close(turned.back(turned.project(G)), G, atol=1e-12, rtol=0)


@pytest.mark.parametrize("inner", [Adam, lambda: Adam8bit(least=10**9)])
def test_full_rank_is_adamw_at_the_scaled_rate(inner) -> None:
    """Exactly, because the basis of a whole side is the identity."""
    p, q = weight(9, 14), weight(9, 14)
    ours = optimizer_of(p, inner(), lr=0.04, rank=9, scale=0.25)
    theirs = torch.optim.AdamW([q], lr=0.01, weight_decay=0.0)
    paths = [walk(o, w, gradients(5, 9, 14)) for o, w in ((ours, p), (theirs, q))]
    for a, b in zip(*paths, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


def test_in_another_full_basis_it_is_adamw_of_the_turned_problem() -> None:
    """Adam sees entries: in P^T W with gradients P^T G it is AdamW, in W itself it is not."""
    P = torch.linalg.qr(randn(9, 9, seed=5)).Q
    space, inner, state = Subspace(left=P), Adam(), {}
    W, turned, plain = randn(9, 14), weight(9, 14), weight(9, 14)
    turned.data, plain.data = P.T @ W, W.clone()
    for G in gradients(4, 9, 14):
        W = W - 0.01 * space.back(inner.direction(state, space.project(G)))
    walk(
        torch.optim.AdamW([turned], lr=0.01, weight_decay=0.0),
        turned,
        [P.T @ G for G in gradients(4, 9, 14)],
    )
    walk(torch.optim.AdamW([plain], lr=0.01, weight_decay=0.0), plain, gradients(4, 9, 14))
    torch.testing.assert_close(P.T @ W, turned.detach(), atol=1e-12, rtol=0)
    assert (W - plain.detach()).abs().max() > 1e-3


# -- periods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_a_period_changes_a_weight_in_its_rank_and_k_periods_in_k_times_it(side) -> None:
    p = weight(16, 20)
    seen = walk(optimizer_of(p, rank=2, interval=4, side=side), p, gradients(12, 16, 20))
    rank = lambda change: int(torch.linalg.matrix_rank(change, atol=1e-9))  # noqa: E731
    for start in (0, 4, 8):
        assert rank(seen[start + 4] - seen[start]) == 2
    assert rank(seen[12] - seen[0]) == 6
    assert rank(seen[6] - seen[2]) == 4  # across a refresh


def test_a_step_is_written_out() -> None:
    """Three steps across a refresh, against the paper's algorithm in a few lines."""
    for on_refresh in ("keep", "zero", "rotate"):
        p, lr, scale, decay = weight(6, 8), 0.1, 0.25, 0.2
        how = {"rank": 3, "interval": 2, "scale": scale, "on_refresh": on_refresh}
        seen = walk(optimizer_of(p, decay=decay, **how), p, gradients(3, 6, 8))
        W, M, V, t, old = seen[0].clone(), 0.0, 0.0, 0, None
        for step, G in enumerate(gradients(3, 6, 8)):
            if step % 2 == 0:
                P = torch.linalg.svd(G).U[:, :3]
                # Signs of singular vectors are free; moments that are kept must find the same.
                P = P * (P * leading_subspace(G, 3, "std", "full").left).sum(0).sign()
                if old is not None and on_refresh == "zero":
                    M, V, t = 0.0, 0.0, 0
                if old is not None and on_refresh == "rotate":
                    M, V = P.T @ old @ M, (P.T @ old) ** 2 @ V
                old = P
            R, t = P.T @ G, t + 1
            M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R * R
            N = (M / (1 - 0.9**t)) / ((V / (1 - 0.999**t)).sqrt() + 1e-8)
            W = (1 - lr * decay) * W - lr * scale * P @ N
            torch.testing.assert_close(seen[step + 1], W, atol=1e-9, rtol=0)


def test_staggered_refreshes_fall_on_different_steps() -> None:
    weights = [weight(6, 8) for _ in range(4)]
    how = Projection(rank=2, interval=8, stagger=True, svd="full")
    run = GaLoreOptimizer([{"params": weights, "projected": True}], projection=how)
    fresh: list[list[int]] = []
    for step in range(1, 20):
        bases = [run.state[w].get("left") for w in weights]
        for i, w in enumerate(weights):
            w.grad = randn(6, 8, seed=100 * step + i)
        run.step()
        fresh.append([i for i, w in enumerate(weights) if run.state[w]["left"] is not bases[i]])
    assert fresh[0] == [0, 1, 2, 3]
    assert max(map(len, fresh[1:])) == 1
    for i in range(4):
        when = [step for step, found in enumerate(fresh) if i in found and step]
        assert len(when) > 1 and set(torch.tensor(when).diff().tolist()) == {8}


# -- state ----------------------------------------------------------------------------------------


def elements(p: nn.Parameter, **how) -> int:
    run = optimizer_of(p, **how)
    walk(run, p, gradients(1, *p.shape))
    return run.state_bytes() // p.element_size()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_state_has_the_formula_s_elements(shape) -> None:
    s, l, r = min(shape), max(shape), 3
    assert elements(weight(*shape), rank=r) == s * r + 2 * l * r
    assert elements(weight(*shape), rank=r, side="reverse_std") == l * r + 2 * s * r
    assert elements(weight(*shape), rank=r, side="full") == (s + l) * r + 2 * r * r
    assert elements(weight(*shape), rank=r, inner=Adafactor()) == s * r + l + r
    assert elements(weight(*shape), rank=s) == 2 * s * l


def test_eight_bits_take_a_byte_an_entry_and_a_scale_a_block() -> None:
    p = weight(40, 64, dtype=torch.float32)
    run = optimizer_of(p, Adam8bit(least=0), rank=10)
    walk(run, p, gradients(1, 40, 64))
    blocks = -(-64 * 10 // 256)
    assert run.state_bytes() == 4 * 40 * 10 + 2 * (64 * 10 + 4 * blocks)


def test_eight_bits_step_as_thirty_two_do_within_two_percent() -> None:
    """From the same history: the moments read back from 8 bits against those that never were."""
    exact, coarse = {}, {}
    full, eight = Adam(), Adam8bit(least=0)
    for G in gradients(20, 64, 48):
        full.direction(exact, G.float())
        eight.direction(coarse, G.float())
    history = {k: v.clone() if torch.is_tensor(v) else v for k, v in exact.items()}
    packed = {"count": history["count"]}
    eight._keep(packed, history["exp_avg"], history["exp_avg_sq"])
    G = randn(64, 48, seed=77).float()
    want, got = full.direction(exact, G), eight.direction(packed, G)
    assert 1e-4 < (got - want).norm() / want.norm() < 0.02
    # Twenty roundings before it together cost little more.
    again = eight.direction(coarse, G)
    assert (again - want).norm() / want.norm() < 0.05


def test_small_tensors_are_not_packed() -> None:
    state: dict = {}
    Adam8bit().direction(state, randn(60, 60))
    assert state["exp_avg"].dtype == torch.float64
    state = {}
    Adam8bit().direction(state, randn(80, 60))
    assert state["exp_avg"].dtype == torch.uint8


def test_adafactor_is_transformers() -> None:
    from transformers import Adafactor as Theirs

    p, q = (weight(9, 14, dtype=torch.float32) for _ in range(2))
    ours = optimizer_of(p, Adafactor(), lr=0.01, rank=9)
    theirs = Theirs([q], lr=0.01, relative_step=False, scale_parameter=False)
    paths = [walk(o, w, gradients(5, 9, 14)) for o, w in ((ours, p), (theirs, q))]
    for a, b in zip(*paths, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("inner", [Adam(), Adam8bit(least=0), Adafactor()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_optimiser_goes_on_exactly(inner, dtype) -> None:
    how = {"rank": 3, "interval": 3, "on_refresh": "rotate", "svd": "randomised", "stagger": True}
    p = weight(12, 16, dtype=dtype)
    whole = walk(optimizer_of(p, inner, **how), p, gradients(8, 12, 16))[-1]
    p = weight(12, 16, dtype=dtype)
    first = optimizer_of(p, inner, **how)
    walk(first, p, gradients(8, 12, 16)[:4])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = optimizer_of(p, inner, **how)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(walk(second, p, gradients(8, 12, 16)[4:])[-1], whole)


def test_half_precision_weights_keep_float32_state() -> None:
    p = weight(12, 16, dtype=torch.bfloat16)
    run = optimizer_of(p, rank=3)
    walk(run, p, gradients(2, 12, 16))
    state = run.state[p]
    assert state["left"].dtype == state["inner"]["exp_avg"].dtype == torch.float32


def test_a_gradient_that_is_no_number_is_named() -> None:
    p = weight(12, 16)
    with pytest.raises(plait.PlaitError, match=r"gradient of '0/0' at step 0.*learning rate"):
        walk(optimizer_of(p, rank=3), p, [torch.full((12, 16), torch.nan)])


# -- the rule -------------------------------------------------------------------------------------


def trained(steps: int = 5, **options) -> dict[str, torch.Tensor]:
    model = make_stack()
    rule = Galore(**{"rank": 3, "interval": 2, **options})
    train(model, plait.RuleStack(model, [rule], lr=1e-2, weight_decay=0.1, seed=3), batches(steps))
    return {n: p.detach() for n, p in base_parameters(model).items()}


def test_linears_of_the_blocks_are_projected_and_the_rest_is_not() -> None:
    model = make_stack()
    run = plait.RuleStack(model, [Galore(rank=2)])
    names = {g["projected"]: g["names"] for g in run.optimizer.param_groups}
    inside = [f"base/layers.{i}.{n}.weight" for i in range(4) for n in ("up", "down")]
    assert sorted(names[True]) == sorted(inside)
    assert len(names[True]) + len(names[False]) == len(base_parameters(model))
    run = plait.RuleStack(model, [Galore(rank=2, embeddings=True)])
    names = {g["projected"]: set(g["names"]) for g in run.optimizer.param_groups}
    assert names[True] == {*inside, "base/embed.weight", "base/head.weight"}


def test_what_is_not_projected_takes_adamw_s_step() -> None:
    model, other = make_stack(), make_stack()
    run = plait.RuleStack(model, [Galore(rank=3)], lr=1e-2, weight_decay=0.1)
    adamw = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1)
    (ids,) = batches(1)
    train(model, run, [ids])
    other(ids).backward()
    adamw.step()
    same = {
        n
        for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True)
        if torch.allclose(p, q, rtol=0, atol=1e-12)
    }
    assert same == {n for n, p in model.named_parameters() if "layers" not in n or p.dim() == 1}


@pytest.mark.parametrize("inner", ["adamw", "adamw-8bit", "adafactor"])
def test_per_layer_takes_the_same_steps_and_frees_gradients_in_backward(inner: str) -> None:
    together, apart = trained(inner=inner), trained(inner=inner, per_layer=True)
    for name, value in together.items():
        assert torch.equal(apart[name], value), name
    model = make_stack()
    run = plait.RuleStack(model, [Galore(rank=3, per_layer=True)], lr=1e-2)
    alive: list[int] = []
    count = lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))  # noqa: E731
    hooks = [p.register_post_accumulate_grad_hook(count) for p in model.parameters()]
    train(model, run, batches(1))
    assert alive and max(alive) == 0
    for hook in hooks:
        hook.remove()
    run.finish()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_per_layer_refuses_a_second_backward() -> None:
    model = make_stack()
    plait.RuleStack(model, [Galore(rank=3, per_layer=True)], lr=1e-2)
    first, second = batches(2)
    model(first).backward()
    with pytest.raises(plait.PlaitError, match="gradient_accumulation 1"):
        model(second).backward()


def test_a_schedule_reaches_both_groups_and_the_hooks() -> None:
    for per_layer in (False, True):
        model = make_stack()
        before = [p.detach().clone() for p in model.parameters()]
        run = plait.RuleStack(model, [Galore(rank=3, per_layer=per_layer)], lr=1e-2)
        for group in run.optimizer.param_groups:
            group["lr"] = 0.0
        train(model, run, batches(2))
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(plait.PlaitError, match="at least 1"):
        Galore(rank=0)
    with pytest.raises(plait.PlaitError, match="adamw, adamw-8bit, adafactor"):
        Galore(inner="sgd")
    model = make_stack()
    plait.attach(model, "lora", targets=["up"], seed=0)
    with pytest.raises(plait.PlaitError, match="relies on"):
        plait.RuleStack(model, ["galore"])
    with pytest.raises(plait.PlaitError, match="no linear layer"):
        plait.RuleStack(nn.Sequential(nn.LayerNorm(4)), ["galore"])
