"""LoRA-RITE: invariance of whole runs, the algorithm written out, and its limits."""

from __future__ import annotations

import pytest
import torch
from rule_models import SITES, adapted_lora, batches, dense, make_stack, train
from torch import Tensor, nn

import plait
from plait.rules.lora_rite import LoraRite


def turned(adapter, by: str) -> None:
    """The same dW from other factors: scaled, or mixed by an invertible R."""
    g = torch.Generator().manual_seed(8)
    eye = torch.eye(3, dtype=torch.float64)
    for delta in adapter.deltas.values():
        R = torch.randn(3, 3, generator=g, dtype=torch.float64) + 2 * eye
        R = R if by == "R" else 100 * eye
        with torch.no_grad():
            delta.A.copy_(torch.linalg.inv(R) @ delta.A)
            delta.B.copy_(delta.B @ R)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("by", ["R", "scale"])
@pytest.mark.parametrize("escape", [False, True])
def test_the_path_of_dw_does_not_depend_on_the_split(steps: int, by: str, escape: bool) -> None:
    found = []
    for turn in (False, True):
        model, adapter = adapted_lora()
        if turn:
            turned(adapter, by)
        run = plait.RuleStack(model, [LoraRite(escape=escape)], lr=1e-2, weight_decay=0.1)
        train(model, run, batches(steps))
        found.append(dense(adapter))
    for path, value in found[0].items():
        torch.testing.assert_close(found[1][path], value, atol=1e-7, rtol=0)


def test_adam_s_path_does() -> None:
    found = []
    for turn in (False, True):
        model, adapter = adapted_lora()
        if turn:
            turned(adapter, "scale")
        train(model, plait.RuleStack(model, lr=1e-2), batches(1))
        found.append(dense(adapter))
    assert all((found[1][p] - v).abs().max() > 1e-3 for p, v in found[0].items())


class Written:
    """The algorithm for one factor, in the basis of the other's left singular vectors."""

    def __init__(self, escape: bool, betas=(0.9, 0.999), eps: float = 1e-6) -> None:
        self.betas, self.eps, self.escape = betas, eps, escape
        self.t, self.rho = 0, torch.zeros((), dtype=torch.float64)

    def unmagnified(self, gradient: Tensor, other: Tensor) -> Tensor:
        self.U, S, Vh = torch.linalg.svd(other, full_matrices=False)
        self.inverse = torch.linalg.inv(S[:, None] * Vh)
        return gradient @ self.inverse

    def step(self, G: Tensor) -> Tensor:
        self.t += 1
        b1, b2 = (b * (1 - b ** (self.t - 1)) / (1 - b**self.t) for b in self.betas)
        if self.t == 1:
            self.M, self.V = torch.zeros_like(G), torch.zeros_like(G.T @ G)
            self.old = self.U
        P, before = self.U.T @ self.old, self.V
        self.M, self.V, self.old = self.M @ P.T, P @ self.V @ P.T, self.U
        if self.escape:
            lost = torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(self.V)
            self.rho = b2 * (self.rho + torch.minimum(lost.max(), lost.sum()).clamp_min(0))
        self.V = b2 * self.V + (1 - b2) * G.T @ G / len(G)
        lam, Q = torch.linalg.eigh(self.V)
        step = G @ Q @ torch.diag(1 / ((lam.clamp_min(0) + self.rho).sqrt() + self.eps)) @ Q.T
        self.M = b1 * self.M + (1 - b1) * step
        return self.M @ self.inverse.T


@pytest.mark.parametrize("escape", [False, True])
@pytest.mark.parametrize("clip", [0.0, 1e-2])
def test_steps_are_the_algorithm_written_out(escape: bool, clip: float) -> None:
    """Four steps of all sites, at learning rates that change, with weight decay."""
    model, adapter = adapted_lora()
    rule = LoraRite(escape=escape, clip=clip, skip=0.0)
    run = plait.RuleStack(model, [rule], lr=1.0, weight_decay=0.1)
    twins = {
        p: [d.A.detach().clone(), d.B.detach().clone(), Written(escape), Written(escape)]
        for p, d in adapter.deltas.items()
    }
    for lr, ids in zip((0.01, 0.03, 0.02, 0.05), batches(4), strict=True):
        run.optimizer.param_groups[0]["lr"] = lr
        model(ids).backward()
        found = {}
        for path, (A, B, of_A, of_B) in twins.items():
            delta = adapter.deltas[path]
            found[path] = (
                of_A.unmagnified(delta.A.grad.T, B),
                of_B.unmagnified(delta.B.grad, A.T),
            )
        norm = torch.stack([G.square().sum() for pair in found.values() for G in pair]).sum().sqrt()
        share = min(1.0, clip / float(norm)) if clip else 1.0
        assert not clip or share < 1
        for path, (A, B, of_A, of_B) in twins.items():
            g_A, g_B = (o.step(share * G) for o, G in zip((of_A, of_B), found[path], strict=True))
            twins[path][:2] = (1 - lr * 0.1) * A - lr * g_A.T, (1 - lr * 0.1) * B - lr * g_B
        run.step()
        for path, (A, B, *_) in twins.items():
            delta = adapter.deltas[path]
            torch.testing.assert_close(delta.A.detach(), A, atol=1e-7, rtol=1e-7)
            torch.testing.assert_close(delta.B.detach(), B, atol=1e-7, rtol=1e-7)


def test_rank_one_is_a_normalised_step() -> None:
    """V is a number then: each factor moves along its gradient, by 1 a root mean square."""
    model, adapter = adapted_lora(rank=1, alpha=2)
    rule = LoraRite(clip=0.0, skip=0.0, eps=1e-12)
    run = plait.RuleStack(model, [rule], lr=0.1)
    model(batches(1)[0]).backward()
    want = {}
    for path, d in adapter.deltas.items():
        rms = lambda t: t.square().mean().sqrt()  # noqa: E731
        want[path] = (
            d.A.detach() - 0.1 * d.A.grad / rms(d.A.grad) / d.B.detach().norm(),
            d.B.detach() - 0.1 * d.B.grad / rms(d.B.grad) / d.A.detach().norm(),
        )
    run.step()
    for path, d in adapter.deltas.items():
        torch.testing.assert_close(d.A.detach(), want[path][0], atol=1e-8, rtol=0)
        torch.testing.assert_close(d.B.detach(), want[path][1], atol=1e-8, rtol=0)


def test_the_first_step_moves_dw_alike_in_every_direction_it_knows() -> None:
    """From B = 0 the step is -lr s M U^T with all singular values of M at the root of its rows."""
    model, adapter = adapted_lora(seed=None)
    before = {p: d.A.detach().clone() for p, d in adapter.deltas.items()}
    rule = LoraRite(eps=1e-14, skip=0.0)
    train(model, plait.RuleStack(model, [rule], lr=0.1), batches(1))
    for path, d in adapter.deltas.items():
        assert torch.equal(d.A, before[path])
        S = torch.linalg.svdvals(d.dense().detach() / (0.1 * d.scaling))
        want = torch.zeros_like(S)
        want[:3] = d.site.out_features**0.5
        torch.testing.assert_close(S, want, atol=1e-5, rtol=0)


def test_the_start_and_a_tiny_b_are_finite_in_float32() -> None:
    model = make_stack(dtype=torch.float32)
    adapter = plait.attach(model, "lora", rank=3, targets=SITES, seed=0)
    with torch.no_grad():
        adapter.deltas["layers.1.up"].B.fill_(1e-20)
    train(model, plait.RuleStack(model, ["lora-rite"], lr=1e-2), batches(6))
    assert all(torch.isfinite(p).all() for p in adapter.parameters())


def test_an_outlier_is_skipped_factor_by_factor() -> None:
    """A factor that is skipped goes on with what it has; at the first step that is nothing."""
    model, adapter = adapted_lora()
    names = [f"{p}.{n}" for p in adapter.deltas for n in "AB"]
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    run = plait.RuleStack(model, ["lora-rite"], lr=1e-2)
    model(batches(1)[0]).backward()
    large = adapter.deltas["layers.2.down"].B
    large.grad.mul_(1e8)
    run.step()
    still = {n for n, p in adapter.named_parameters() if torch.equal(p, before[n])}
    assert len(names) == len(before) and len(still) == 1
    assert dict(adapter.named_parameters())[still.pop()] is large


def test_a_frozen_factor_stays() -> None:
    model, adapter = adapted_lora()
    delta = adapter.deltas["layers.0.up"]
    delta.A.requires_grad_(False)
    before = delta.A.detach().clone(), delta.B.detach().clone()
    train(model, plait.RuleStack(model, ["lora-rite"], lr=1e-2), batches(2))
    assert torch.equal(delta.A, before[0]) and not torch.equal(delta.B, before[1])


def test_what_is_in_no_pair_takes_adam_s_step() -> None:
    """DoRA's magnitudes, beside its pairs."""
    model = make_stack()
    adapter = plait.attach(model, "dora", rank=3, targets=SITES, seed=0)
    run = plait.RuleStack(model, ["lora-rite"], lr=1e-2, weight_decay=0.1)
    paired = {id(t) for p in adapter.pairs() for t in (p.A, p.B)}
    extra = [p for p in adapter.parameters() if id(p) not in paired]
    assert len(extra) == len(adapter.deltas)
    twins = [nn.Parameter(p.detach().clone()) for p in extra]
    adamw = torch.optim.AdamW(twins, lr=1e-2, weight_decay=0.1)
    for ids in batches(3):
        model(ids).backward()
        for p, q in zip(extra, twins, strict=True):
            q.grad = p.grad.clone()
        run.step()
        adamw.step()
        for p, q in zip(extra, twins, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), atol=1e-12, rtol=0)


def test_the_state_is_adam_s_and_two_small_squares() -> None:
    model, adapter = adapted_lora()
    run = plait.RuleStack(model, ["lora-rite"], lr=1e-2)
    train(model, run, batches(1))
    kept = run.rules[0].state_dict()["pairs"].values()
    numbers = sum(t.numel() for one in kept for t in one.values() if isinstance(t, Tensor))
    adam = 2 * adapter.num_parameters()
    assert numbers == adam + len(adapter.deltas) * (2 * 3**2 + 2)


def test_packed_experts_are_pairs_of_their_own() -> None:
    """Two experts in one parameter move as two adapters of one expert each would."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    A, B, GA, GB = draw(2, 3, 7), draw(2, 5, 3), draw(2, 3, 7), draw(2, 5, 3)

    def directions(split: bool) -> Tensor:
        rule, found = LoraRite(clip=0.0, skip=0.0), []
        for part in (slice(0, 1), slice(1, 2)) if split else (slice(0, 2),):
            pair = plait.adapter.Pair("x", *(nn.Parameter(t[part]) for t in (A, B)), 1.0, None)
            pair.A.grad, pair.B.grad = GA[part].clone(), GB[part].clone()
            for side in rule._sides([("x", pair)]):
                rule.setup(None)
                found.append(rule._pairs.direction(side, side.gradient)[0] @ side.inverse[0].mT)
        return found

    apart, whole = directions(True), directions(False)
    for i, one in enumerate(whole):
        torch.testing.assert_close(one, torch.cat([apart[i], apart[i + 2]]), atol=1e-12, rtol=0)


def test_what_cannot_work_is_refused() -> None:
    model = make_stack()
    plait.attach(model, "ia3", targets=SITES)
    with pytest.raises(plait.PlaitError, match="needs \\(A, B\\) pairs"):
        plait.RuleStack(model, ["lora-rite"])
    for wrong in ({"betas": (0.9, 1.0)}, {"eps": 0.0}, {"clip": -1.0}):
        with pytest.raises(plait.PlaitError, match="lora-rite"):
            LoraRite(**wrong)
    model, _ = adapted_lora()
    with pytest.raises(plait.PlaitError, match="keep one of them"):
        plait.RuleStack(model, ["lora-rite", "lora-pro"])
