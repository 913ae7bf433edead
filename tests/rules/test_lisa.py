"""LISA: what trains at every step, how often each block does, and what the optimiser holds."""

from __future__ import annotations

import math

import pytest
import torch
from rule_models import batches, make_stack, train

import plait
from plait.adapter import Rule, make_group
from plait.rules._base_weights import base_parameters
from plait.rules.lisa import Lisa


class Everything(Rule):
    """Full fine-tuning, as the oracle."""

    needs_adapter = False

    def parameter_groups(self, groups):
        named = base_parameters(self.run.model).items()
        return [*groups, make_group(named, self.run.lr, self.run.weight_decay)]


def active_blocks(model) -> list[int]:
    return [i for i, b in enumerate(model.layers) if all(p.requires_grad for p in b.parameters())]


def outside(model) -> list[torch.nn.Parameter]:
    return [p for n, p in model.named_parameters() if not n.startswith("layers.")]


def test_exactly_the_drawn_blocks_train_beside_embedding_norm_and_head() -> None:
    model = make_stack(depth=6)
    run = plait.RuleStack(model, [Lisa(blocks=2, interval=2)], lr=1e-3)
    seen = []
    for ids in batches(12):
        assert len(active_blocks(model)) == 2
        frozen = [b for i, b in enumerate(model.layers) if i not in active_blocks(model)]
        assert not any(p.requires_grad for b in frozen for p in b.parameters())
        assert all(p.requires_grad for p in outside(model))
        seen.append(tuple(active_blocks(model)))
        train(model, run, [ids])
    assert all(seen[i] == seen[i + 1] for i in range(0, 12, 2))
    assert len(set(seen)) > 1


def test_blocks_never_drawn_are_bitwise_unchanged_and_the_others_moved() -> None:
    model = make_stack(depth=6)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    rule = Lisa(blocks=1, interval=3)
    run = plait.RuleStack(model, [rule], lr=1e-3, weight_decay=0.1)
    drawn = set()
    for ids in batches(9):
        drawn |= set(rule.active)
        train(model, run, [ids])
    assert 0 < len(drawn) < 6
    for name, parameter in model.named_parameters():
        block = int(name.split(".")[1]) if name.startswith("layers.") else None
        if block is None or block in drawn:
            assert not torch.equal(parameter, start[name]), name
        else:
            assert torch.equal(parameter, start[name]), name


@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]])
def test_blocks_are_drawn_as_often_as_their_probability(weights: list[float] | None) -> None:
    model, draws, k = make_stack(depth=6), 3000, 2
    rule = Lisa(blocks=k, interval=1, weights=weights)
    plait.RuleStack(model, [rule])
    counts = torch.zeros(6)
    for _ in range(draws):
        drawn = rule._draw()
        assert len(set(drawn)) == k
        counts[drawn] += 1
    share = torch.tensor(weights or [1.0] * 6)
    expected = share / share.sum() * k * draws
    # Draws of one round exclude each other, which only lowers the statistic; df = 5, p = 0.01.
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 15.09
    assert math.isclose(float(counts.sum()), k * draws)


def test_all_blocks_at_once_is_full_fine_tuning() -> None:
    ends = []
    for rule in (Lisa(blocks=4, interval=2), Everything()):
        model = make_stack(depth=4)
        train(model, plait.RuleStack(model, [rule], lr=1e-3, weight_decay=0.05), batches(7))
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


@pytest.mark.parametrize("drop", [True, False])
def test_the_optimiser_holds_state_for_what_trains_only(drop: bool) -> None:
    model = make_stack(depth=6)
    run = plait.RuleStack(model, [Lisa(blocks=1, interval=1, drop_states=drop)], lr=1e-3)
    train(model, run, batches(20))
    held = {id(p) for p, state in run.optimizer.state.items() if state}
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    assert (held <= trains) == drop


def test_resuming_gives_the_same_draws_and_weights() -> None:
    data = batches(10)
    rules = lambda: [Lisa(blocks=2, interval=3)]  # noqa: E731
    whole = make_stack(depth=6)
    train(whole, plait.RuleStack(whole, rules(), lr=1e-3, seed=4), data)

    first = make_stack(depth=6)
    run = plait.RuleStack(first, rules(), lr=1e-3, seed=4)
    train(first, run, data[:5])
    saved = first.state_dict(), run.optimizer.state_dict(), run.state_dict()
    second = make_stack(seed=9, depth=6)
    second.load_state_dict(saved[0])
    run = plait.RuleStack(second, rules(), lr=1e-3, seed=4)
    run.optimizer.load_state_dict(saved[1])
    run.load_state_dict(saved[2])
    train(second, run, data[5:])
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in whole.state_dict().items())


def test_draws_depend_on_the_seed_alone() -> None:
    def draws(seed: int, noise: int) -> list[list[int]]:
        torch.manual_seed(noise)
        rule = Lisa(blocks=2)
        plait.RuleStack(make_stack(depth=6), [rule], seed=seed)
        return [rule._draw() for _ in range(8)]

    assert draws(1, 0) == draws(1, 5) != draws(2, 0)


def test_over_adapters_samples_their_blocks_and_leaves_the_base_alone() -> None:
    model = make_stack(depth=4)
    adapter = plait.attach(model, "lora", rank=2, targets=["up", "down"], seed=0)
    start = adapter.state_dict()
    start = {k: v.clone() for k, v in start.items()}
    run = plait.RuleStack(model, [Lisa(blocks=1, interval=100, over="adapters")], lr=1e-2)
    train(model, run, batches(4))
    moved = {
        k.split(".")[1] for k, v in adapter.state_dict().items() if not torch.equal(v, start[k])
    }
    assert len(moved) == 1
    assert all(not p.requires_grad for p in base_parameters(model).values())


def test_training_base_weights_under_an_adapter_is_refused() -> None:
    model = make_stack()
    plait.attach(model, "lora", rank=2, seed=0)
    with pytest.raises(plait.PlaitError, match="method: none"):
        plait.RuleStack(model, ["lisa"])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Lisa(blocks=5), "has 4 of them"),
        (Lisa(interval=0), "interval"),
        (Lisa(weights=[1.0, 2.0]), "4 numbers"),
        (Lisa(weights=[9.0, 1.0, 1.0, 1.0]), "above 1"),
    ],
)
def test_impossible_settings_are_refused(rule: Lisa, message: str) -> None:
    with pytest.raises(plait.PlaitError, match=message):
        plait.RuleStack(make_stack(depth=4), [rule])
