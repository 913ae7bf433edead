"""DyLoRA: every rank is an adapter, drawn alike everywhere, and what a step leaves out stays."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from rule_models import batches, make_stack, randomise, train

import plait
from plait.adapter import bind, install
from plait.rules.dylora import Dylora, truncate
from plait.testing.models import tiny_llama


def adapted(rank: int = 4, **options):
    model = make_stack()
    options = {"rank": rank, "alpha": 6.0, "targets": ["up", "down"], "seed": 0, **options}
    return model, plait.attach(model, "dylora", **options)


def stack_of(model, steps: int = 12, decay: float = 0.0, factory=None, **options):
    return plait.RuleStack(
        model,
        [Dylora(**options)],
        lr=1e-2,
        weight_decay=decay,
        total_steps=steps,
        seed=3,
        optimizer_factory=factory,
    )


def plain_lora(adapter, rank: int, **options):
    """LoRA with the leading components of a dylora adapter, on a base of its own."""
    model = make_stack()
    lora = plait.attach(model, "lora", rank=rank, alpha=6.0, targets=["up", "down"], **options)
    for path, delta in lora.deltas.items():
        own = adapter.deltas[path]
        delta.set_pair(own.A[:rank], own.B[:, :rank])
    return model, lora


def values(adapter) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in adapter.named_parameters()}


@pytest.mark.parametrize("frozen", [True, False])
def test_a_training_pass_is_a_lora_of_the_drawn_rank(frozen: bool) -> None:
    model, adapter = adapted()
    (ids,) = batches(1)
    base = make_stack()(ids)
    run = stack_of(model, frozen=frozen)
    rule, seen = run.rules[0], set()
    for step in range(12):
        run.run.step = step
        torch.testing.assert_close(model(ids), base)  # B is 0, for every b
        seen.add(rule.width(step))
    assert seen == {1, 2, 3, 4}
    randomise(adapter)
    for step in range(12):
        run.run.step, b = step, rule.width(step)
        other, lora = plain_lora(adapter, b)
        loss, theirs = model(ids), other(ids)
        torch.testing.assert_close(loss, theirs, rtol=1e-12, atol=1e-12)
        adapter.requires_grad_(True)
        for p in adapter.parameters():
            p.grad = None
        loss.backward()
        theirs.backward()
        for path, delta in adapter.deltas.items():
            first = b - 1 if frozen else 0
            torch.testing.assert_close(delta.A.grad[first:b], lora.deltas[path].A.grad[first:])
            torch.testing.assert_close(
                delta.B.grad[:, first:b], lora.deltas[path].B.grad[:, first:]
            )
            assert not delta.A.grad[:first].any() and not delta.A.grad[b:].any()
            assert not delta.B.grad[:, :first].any() and not delta.B.grad[:, b:].any()


OPTIMISERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups),
    "adam": lambda groups: torch.optim.Adam(groups, weight_decay=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_a_step_leaves_out_stays_bit_for_bit(name: str, frozen: bool) -> None:
    model, adapter = adapted()
    randomise(adapter)
    run = stack_of(model, decay=0.3, factory=OPTIMISERS[name], frozen=frozen)
    for step, ids in enumerate(batches(10)):
        b, before = run.rules[0].width(step), values(adapter)
        memory = copy.deepcopy({p: run.optimizer.state.get(p, {}) for p in adapter.parameters()})
        memory = dict(zip(values(adapter), memory.values(), strict=True))
        train(model, run, [ids])
        moving = range(b - 1, b) if frozen else range(b)
        for key, p in adapter.named_parameters():
            axis = 0 if key.endswith("A") else 1
            state = {k: v for k, v in run.optimizer.state[p].items() if v.shape == p.shape}
            assert state
            for k in range(4):
                same = torch.equal(p.select(axis, k), before[key].select(axis, k))
                assert same == (k not in moving), (step, key, k)
                for part, value in state.items():
                    old = memory[key].get(part, torch.zeros_like(value))
                    if k not in moving:
                        assert torch.equal(value.select(axis, k), old.select(axis, k))


def test_the_greatest_rank_without_freezing_is_plain_lora() -> None:
    model, adapter = adapted()
    other, lora = plain_lora(adapter, 4)
    data = batches(5)
    ours = train(model, stack_of(model, frozen=False, lowest=4, decay=0.1), data)
    theirs = train(other, plait.RuleStack(other, lr=1e-2, weight_decay=0.1), data)
    assert ours == pytest.approx(theirs, rel=1e-12)
    for path, delta in adapter.deltas.items():
        torch.testing.assert_close(delta.dense(), lora.deltas[path].dense(), rtol=1e-9, atol=1e-12)


def test_ranks_are_drawn_evenly_and_from_the_seed_alone() -> None:
    model, _ = adapted(rank=8)
    rule = stack_of(model).rules[0]
    drawn = [rule.width(step) for step in range(10_000)]
    counts = Counter(drawn)
    assert set(counts) == set(range(1, 9))
    # 24.3 is the 99.9 % point of chi-square with 7 degrees of freedom.
    assert sum((c - 1250) ** 2 / 1250 for c in counts.values()) < 24.3
    again = stack_of(adapted(rank=8)[0]).rules[0]
    assert drawn[:50] == [again.width(step) for step in range(50)]


def test_a_geometric_distribution_and_a_least_rank() -> None:
    model, _ = adapted(rank=6)
    rule = stack_of(model, distribution="geometric", stop=0.5, lowest=2).rules[0]
    counts = Counter(rule.width(step) for step in range(4000))
    weights = {b: 0.5 ** (b - 2) for b in range(2, 7)}
    total = sum(weights.values())
    for b, weight in weights.items():
        share = weight / total
        assert abs(counts[b] - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5
    assert sum(counts.values()) == sum(counts[b] for b in weights)


def test_evaluation_is_at_full_rank_whenever_it_happens() -> None:
    model, adapter = adapted()
    randomise(adapter)
    run = stack_of(model, lowest=1)
    data = batches(6)
    full, _ = plain_lora(adapter, 4)
    step = next(s for s in range(12) if run.rules[0].width(s) < 4)
    run.run.step = step
    assert abs(float((model(data[0]) - full(data[0])).detach())) > 1e-6
    with torch.no_grad():
        torch.testing.assert_close(model(data[0]), full(data[0]), rtol=1e-12, atol=1e-12)
    model(data[0])
    model.eval()
    torch.testing.assert_close(model(data[0]), full(data[0]), rtol=1e-12, atol=1e-12)
    model.train()
    train(model, run, data[:1])
    for delta in adapter.deltas.values():  # between steps dW is the whole one
        torch.testing.assert_close(delta.dense(), 1.5 * delta.B @ delta.A)
    run.finish()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("rslora", [False, True])
def test_every_rank_can_be_cut_out_as_a_plain_lora(tmp_path, rslora: bool) -> None:
    model, adapter = adapted(rslora=rslora, overrides={"layers.1.up": {"rank": 2}})
    randomise(adapter)
    (ids,) = batches(1)
    for b in range(1, 5):
        cut = truncate(adapter, b)
        assert cut.method.name == "lora" and cut.model is None
        for path, delta in adapter.deltas.items():
            k = min(b, delta.rank)
            scale = 6.0 / (k**0.5 if rslora else k)
            made = cut.deltas[path]
            assert made.rank == k and made.scaling == pytest.approx(scale)
            torch.testing.assert_close(made.dense(), scale * delta.B[:, :k] @ delta.A[:k])
        cut.save(tmp_path / f"cut{b}")
        plait.load(make_stack(), tmp_path / f"cut{b}")
    other = make_stack()
    install(other, bind(cut, other))
    torch.testing.assert_close(other(ids), model(ids), rtol=1e-12, atol=1e-12)


def test_sites_of_lower_rank_sit_out_where_they_lack_the_component() -> None:
    model, adapter = adapted(overrides={"layers.1.up": {"rank": 2}})
    randomise(adapter)
    run = stack_of(model)
    small = adapter.deltas["layers.1.up"]
    for step, ids in enumerate(batches(8)):
        before = small.A.detach().clone()
        train(model, run, [ids])
        changed = [k for k in range(2) if not torch.equal(small.A[k], before[k])]
        b = run.rules[0].width(step)
        assert changed == ([b - 1] if b <= 2 else [])


def test_recomputed_activations_see_the_same_rank() -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_llama().double().requires_grad_(False)
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        adapter = plait.attach(model, "dylora", rank=4, seed=0)
        randomise(adapter)
        run = plait.RuleStack(model.train(), [Dylora()], lr=1e-2, seed=3)
        ids = torch.arange(12).reshape(2, 6)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            run.step()
        found.append(values(adapter))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-9, atol=1e-12)


def test_settings_that_cannot_be_are_refused() -> None:
    model, adapter = adapted()
    for options, message in (
        ({"stop": 1.0}, "must lie in"),
        ({"distribution": "normal"}, "use one of uniform, geometric"),
        ({"lowest": 5}, "go up to 4"),
        ({"lowest": 0}, "lowest is 0"),
    ):
        with pytest.raises(plait.PlaitError, match=message):
            stack_of(model, **options)
    for rank in (0, 5):
        with pytest.raises(plait.PlaitError, match="from 1 to 4"):
            truncate(adapter, rank)
    other = make_stack()
    lora = plait.attach(other, "lora", rank=2, seed=0)
    with pytest.raises(plait.PlaitError, match="attach method dylora"):
        plait.RuleStack(other, ["dylora"], total_steps=10)
    with pytest.raises(plait.PlaitError, match="cannot be cut"):
        truncate(lora, 1)
