"""LoRA-FA: A never moves, B's step is full training's projected on A's rows; PEFT as an oracle."""

from __future__ import annotations

import pytest
import torch
from rule_models import batches, make_stack, randomise, train
from torch import nn

import plait
from plait.rules.lora_fa import LoraFa

SITES = ["up", "down"]


def adapted(**options):
    model = make_stack()
    options = {"rank": 3, "alpha": 5, "targets": SITES, "seed": 0, **options}
    return model, plait.attach(model, "lora", **options)


def sgd(groups):
    return torch.optim.SGD(groups)


def stack_of(model, rule=None, **options) -> plait.RuleStack:
    settings = {"lr": 1e-2, "optimizer_factory": sgd, **options}
    return plait.RuleStack(model, [rule or LoraFa()], **settings)


def test_a_is_untouched_and_only_b_is_trained() -> None:
    model, adapter = adapted()
    before = {p: d.A.detach().clone() for p, d in adapter.deltas.items()}
    run = plait.RuleStack(model, ["lora-fa"], lr=1e-2, weight_decay=0.1)
    train(model, run, batches(5))
    listed = {id(p) for g in run.optimizer.param_groups for p in g["params"]}
    for path, delta in adapter.deltas.items():
        assert torch.equal(delta.A, before[path]) and delta.B.any()
        assert delta.A.grad is None and id(delta.A) not in listed and id(delta.B) in listed
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert trained == sum(3 * d.site.out_features for d in adapter.deltas.values())


def test_factors_train_again_after_the_run() -> None:
    model, adapter = adapted()
    adapter.deltas["layers.0.up"].A.requires_grad_(False)
    run = stack_of(model)
    train(model, run, batches(1))
    run.finish()
    on = {p for p, d in adapter.deltas.items() if d.A.requires_grad}
    assert on == set(adapter.deltas) - {"layers.0.up"}


def test_the_step_is_the_full_gradient_projected_on_a_s_rows() -> None:
    model, adapter = adapted()
    randomise(adapter)
    ids, *_ = batches(1)
    weights = {path: d.site.base.weight for path, d in adapter.deltas.items()}
    for w in weights.values():
        w.requires_grad_(True)
    full = torch.autograd.grad(model(ids), list(weights.values()))
    for w in weights.values():
        w.requires_grad_(False)
    before = {p: d.dense().detach() for p, d in adapter.deltas.items()}
    train(model, stack_of(model, LoraFa(damping=0.0), lr=0.1), [ids])
    for (path, delta), G in zip(adapter.deltas.items(), full, strict=True):
        P = delta.A.T @ torch.linalg.pinv(delta.A.T)
        moved = (delta.dense() - before[path]).detach()
        torch.testing.assert_close(moved, -0.1 * G @ P, rtol=1e-6, atol=1e-9)


def test_dw_does_not_depend_on_the_basis_of_a_s_rows() -> None:
    found = []
    for turn in (False, True):
        model, adapter = adapted()
        randomise(adapter)
        if turn:
            g = torch.Generator().manual_seed(8)
            with torch.no_grad():
                for delta in adapter.deltas.values():
                    R = torch.randn(3, 3, generator=g, dtype=torch.float64) + 2 * torch.eye(3)
                    delta.A.copy_(R @ delta.A)
                    delta.B.copy_(delta.B @ torch.linalg.inv(R))
        train(model, stack_of(model), batches(4))
        found.append({p: d.dense().detach() for p, d in adapter.deltas.items()})
    for path, dense in found[0].items():
        torch.testing.assert_close(found[1][path], dense, rtol=1e-5, atol=1e-8)


def test_orthonormal_rows_and_scale_one_need_no_correction() -> None:
    found = []
    for correct in (True, False):
        model, adapter = adapted(alpha=3)
        with torch.no_grad():
            for delta in adapter.deltas.values():
                delta.A.copy_(torch.linalg.qr(delta.A.T).Q.T)
        train(model, stack_of(model, LoraFa(correct=correct)), batches(3))
        found.append({p: d.dense().detach() for p, d in adapter.deltas.items()})
    for path, dense in found[0].items():
        torch.testing.assert_close(found[1][path], dense, rtol=1e-6, atol=1e-9)


def test_uncorrected_it_is_lora_with_a_frozen() -> None:
    model, adapter = adapted()
    train(model, stack_of(model, LoraFa(correct=False)), batches(4))
    other, plain = adapted()
    for delta in plain.deltas.values():
        delta.A.requires_grad_(False)
    train(other, plait.RuleStack(other, lr=1e-2, optimizer_factory=sgd), batches(4))
    for path, delta in adapter.deltas.items():
        assert torch.equal(delta.B, plain.deltas[path].B)


def test_it_trains_as_peft_s_optimiser_does(monkeypatch) -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # else it rounds to bfloat16
    model, adapter = adapted()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=SITES)
    theirs = peft.get_peft_model(make_stack(), config).double()
    modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            modules[path].lora_A["default"].weight.copy_(delta.A)
    optimizer = create_lorafa_optimizer(theirs, r=3, lora_alpha=5, lr=1e-2)
    optimizer.param_groups[0]["eps"] = 0.0  # it stands before the bias correction there
    adamw = lambda groups: torch.optim.AdamW(groups, eps=0.0)  # noqa: E731
    run = stack_of(model, LoraFa(damping=0.0), optimizer_factory=adamw)
    for ids in batches(6):
        train(model, run, [ids])
        theirs.base_model.model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    for path, delta in adapter.deltas.items():
        other = modules[path].lora_B["default"].weight
        torch.testing.assert_close(delta.B, other, rtol=1e-5, atol=1e-8)


def test_on_an_embedding_the_table_learns_and_the_random_factor_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 2)).double()
    adapter = plait.attach(model, "lora", rank=2, targets=["0"], seed=0)
    delta = adapter.deltas["0"]
    before = delta.B.detach().clone()
    run = stack_of(model)
    ids = torch.arange(9)
    weight = model[0].weight
    weight.requires_grad_(True)
    (G,) = torch.autograd.grad(model(ids).square().sum(), [weight])
    weight.requires_grad_(False)
    model(ids).square().sum().backward()
    run.step()
    assert torch.equal(delta.B, before)
    P = before @ torch.linalg.pinv(before)
    torch.testing.assert_close(delta.dense().detach(), -1e-2 * P @ G.T, rtol=1e-6, atol=1e-9)


def test_backward_keeps_the_projected_input_only() -> None:
    """Rank 3 beside width 12: with A frozen, nothing of the input's size is saved at `down`."""
    model, adapter = adapted()
    module = adapter.deltas["layers.0.down"].site.base
    x = torch.randn(50, module.in_features, dtype=torch.float64, requires_grad=True)

    def saved() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, id):
            module(x)
        return sum(s.numel() for s in sizes if s[0] == 50 or s[-1] == 50)

    before = saved()
    stack_of(model)
    assert before - saved() == x.numel()


def test_methods_without_pairs_are_refused() -> None:
    model = make_stack()
    plait.attach(model, "ia3", targets=SITES)
    with pytest.raises(plait.PlaitError, match="needs \\(A, B\\) pairs"):
        plait.RuleStack(model, ["lora-fa"])
