"""MoSA: experts that partition, move alone, and are one plain adapter when read together."""

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

import plait
import tiny
from plait.errors import PlaitError
from plait.rules._passes import symmetric_kl
from plait.rules._sparse_experts import deal
from plait.rules.mosa import Mosa
from plait.testing import check_method

METHOD = plait.get_method("mosa")
SPLITS = ("tensor", "row", "column")


def llama(size=0.3, **options):
    model = tiny.llama()
    chosen = {"rank": 8, "experts": 4, "dropout": 0.0, **options}
    adapter = plait.attach(model, "mosa", seed=1, **chosen)
    if size:
        tiny.scramble(adapter, size)
    return model, adapter


def step(model, run, seed=0):
    loss = model(**tiny.batch(seed=seed)).loss
    (loss + run.extra_loss()).backward()
    run.step()
    return loss.item()


def values(adapter):
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}


@pytest.mark.parametrize("by", SPLITS)
@pytest.mark.parametrize("shape", [(8, 32), (7, 13)])
def test_experts_partition_the_entries_evenly(by, shape):
    part = deal(shape, 3, by, torch.Generator().manual_seed(0))
    assert part.shape == shape
    for line in {"tensor": [part.flatten()], "row": part, "column": part.T}[by]:
        sizes = line.bincount(minlength=3)
        assert sizes.sum() == line.numel() and sizes.max() - sizes.min() <= 1
    other = deal(shape, 3, by, torch.Generator().manual_seed(1))
    assert not torch.equal(part, other)


@pytest.mark.parametrize("share", ["down", "up", "none"])
@pytest.mark.parametrize("by", SPLITS)
def test_a_drawn_expert_sees_its_own_entries_and_the_start_elsewhere(share, by):
    model, adapter = llama(size=0.0, share=share, split=by)
    delta = next(iter(adapter.deltas.values()))
    start = {name: delta.projection(name).detach().clone() for name in ("D", "U")}
    tiny.scramble(adapter, 0.3)
    merged = {name: delta.projection(name).detach() for name in ("D", "U")}
    model.train()
    for expert in range(4):
        delta.active = dict.fromkeys(delta.ends, expert)
        for name in ("D", "U"):
            if name not in delta.ends:
                assert delta.projection(name) is delta.get_parameter(name)
                continue
            mask = torch.zeros(merged[name].numel(), dtype=torch.bool)
            mask[delta.positions(name, expert)] = True
            mask = mask.view(merged[name].shape)
            wanted = torch.where(mask, merged[name], start[name])
            assert torch.equal(delta.projection(name), wanted)
    model.eval()
    assert all(torch.equal(delta.projection(name), merged[name]) for name in merged)


def test_output_is_the_formula_of_a_standard_adapter():
    model, adapter = llama(share="none", scale=0.7)
    path, delta = next(iter(adapter.deltas.items()))
    x = torch.randn(2, 5, 32)
    got = model.get_submodule(path)(x)
    plait.activate(model, {})
    D, U = delta.projection("D"), delta.projection("U")
    seen = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    seen = seen * delta.norm_scale + delta.norm_shift
    hidden = F.gelu(seen @ D.T + delta.b_d)
    wanted = model.get_submodule(path)(x) + 0.7 * (hidden @ U.T + delta.b_u)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", ["down", "none"])
@pytest.mark.parametrize("training", [False, True])
def test_the_start_is_the_base_model_in_both_modes(share, training):
    model = tiny.llama().train(training)
    before = tiny.logits(model)
    plait.attach(model, "mosa", rank=8, share=share, dropout=0.0)
    run = plait.RuleStack(model, [Mosa(kl=0.0)], lr=1e-2)
    assert torch.equal(tiny.logits(model), before)
    assert run.optimizer is not None


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("kl", [0.0, 1.0])
def test_only_what_was_drawn_moves_decay_and_momentum_included(optimizer, kl):
    model, adapter = llama(share="none")
    model.train()
    make = {
        "AdamW": torch.optim.AdamW,
        "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    }[optimizer]
    run = plait.RuleStack(
        model, [Mosa(kl=kl)], lr=1e-2, weight_decay=0.1, optimizer_factory=make, seed=3
    )
    drawn_ever = set()
    for number in range(6):
        drawn = {(p, n, e) for p, d in adapter.deltas.items() for n, e in d.active.items()}
        if kl:
            run.rules[0]._draw("second")
            drawn |= {(p, n, e) for p, d in adapter.deltas.items() for n, e in d.active.items()}
            run.rules[0]._draw("first")
        before = values(adapter)
        step(model, run, number)
        for path, delta in adapter.deltas.items():
            for name in delta.ends:
                for expert in range(4):
                    key = f"{path}.{name}{expert}"
                    same = torch.equal(values(adapter)[key], before[key])
                    assert same != ((path, name, expert) in drawn), (number, key)
        drawn_ever |= drawn
    assert len(drawn_ever) >= 8


def test_an_expert_has_adams_steps_to_itself():
    model, adapter = llama(share="down")
    model.train()
    run = plait.RuleStack(model, [Mosa(kl=0.0)], lr=1e-2)
    delta = next(iter(adapter.deltas.values()))
    drawn = [0] * 4
    for number in range(10):
        drawn[delta.active["U"]] += 1
        step(model, run, number)
    state = run.optimizer.state
    steps = [
        int(state[p]["step"]) if (p := delta.get_parameter(f"U{e}")) in state else 0
        for e in range(4)
    ]
    assert steps == drawn


def test_one_expert_is_the_standard_adapter():
    ends = []
    for experts in (1, 4):
        model, adapter = llama(size=0.0, experts=experts, share="none")
        model.train()
        if experts == 1:
            run = plait.RuleStack(model, [Mosa(kl=0.0)], lr=0.1, optimizer_factory=torch.optim.SGD)
            for number in range(5):
                step(model, run, number)
            run.finish()
        else:  # an optimiser without the rule: all experts are seen and train
            optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
            for number in range(5):
                optimizer.zero_grad()
                model(**tiny.batch(seed=number)).loss.backward()
                optimizer.step()
        ends.append([d.projection(n) for d in adapter.deltas.values() for n in ("D", "U")])
    for one, four in zip(*ends, strict=True):
        torch.testing.assert_close(one, four)


def test_draws_are_uniform_independent_and_of_the_run():
    model, adapter = llama(size=0.0, share="none")
    rule = Mosa(kl=0.0)
    run = plait.RuleStack(model, [rule], lr=1e-2, seed=5)
    counts = torch.zeros(4, 4)
    for number in range(400):
        run.run.step = number
        rule._draw("first")
        for delta in adapter.deltas.values():
            counts[delta.active["D"], delta.active["U"]] += 1
    assert float(((counts - 50) ** 2 / 50).sum()) < 37.7  # chi square, 15 degrees, 0.1 %
    again, other = llama(size=0.0, share="none")
    plait.RuleStack(again, [Mosa(kl=0.0)], lr=1e-2, seed=5).load_state_dict(
        {"step": 399, "rules": [{}]}
    )
    assert [d.active for d in other.deltas.values()] == [d.active for d in adapter.deltas.values()]


def test_the_second_pass_adds_the_divergence_of_two_draws():
    model, adapter = llama(share="none")
    model.train()
    rule = Mosa(kl=0.3)
    run = plait.RuleStack(model, [rule], lr=1e-2)
    data, answers = tiny.batch(), []
    for which in ("first", "second"):
        rule._draw(which)
        with torch.no_grad():
            answers.append(model(**data).logits[:, :-1].double())  # the last has no label
    rule._draw("first")
    model(**data)
    p, q = (a.softmax(-1) for a in answers)
    wanted = 0.5 * ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean()
    assert wanted > 1e-6
    got = run.extra_loss()
    torch.testing.assert_close(got.double(), 0.3 * wanted, rtol=1e-3, atol=1e-7)
    got.backward()
    assert any(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert run.extra_loss() == 0.0  # nothing new was answered
    assert symmetric_kl(answers[0], answers[0]) == 0.0
    run.finish()
    assert not model._forward_hooks


def test_resuming_gives_the_same_trajectory():
    whole, adapter = llama(size=0.0, dropout=0.1)
    run = plait.RuleStack(whole.train(), [Mosa(kl=0.5)], lr=1e-2, seed=2)
    for number in range(3):
        step(whole, run, number)
    saved = copy.deepcopy((adapter.state_dict(), run.optimizer.state_dict(), run.state_dict()))
    resumed, again = llama(size=0.0, dropout=0.1)
    again.load_state_dict(saved[0])
    other = plait.RuleStack(resumed.train(), [Mosa(kl=0.5)], lr=1e-2, seed=2)
    other.optimizer.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    for number in range(3, 6):
        torch.manual_seed(number)  # dropout's own
        step(whole, run, number)
        torch.manual_seed(number)
        step(resumed, other, number)
    for key, value in adapter.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_training_and_the_count_of_a_standard_adapter():
    model, adapter = llama(size=0.0)
    sites = [d.site for d in adapter.deltas.values()]
    wanted = 2 * (2 * 8 * 32 + 8 + 32 + 64)
    assert adapter.num_parameters() == METHOD.count(sites, adapter.options) == wanted
    assert sum(t.numel() for t in adapter.state_dict().values()) == wanted
    model.train()
    run = plait.RuleStack(model, ["mosa"], lr=3e-2)
    before = model(**tiny.batch(rows=8)).loss.item()
    for _ in range(25):
        step(model, run)
    run.finish()
    model.eval()
    assert model(**tiny.batch(rows=8)).loss.item() < 0.95 * before


@pytest.mark.parametrize(
    "example",
    [
        {"rank": 6, "experts": 2, "share": "none", "split": "row", "norm": False},
        {"rank": 6, "share": "up", "split": "column", "placement": "sequential"},
    ],
)
def test_the_kit_holds_for_the_other_forms(example):
    other = dataclasses.replace(METHOD, name="mosa-other", example=example)
    check_method(other, dtypes=[torch.float32])


def test_what_does_not_fit_is_refused():
    for wrong in ({"experts": 0}, {"share": "both"}, {"split": "diagonal"}):
        with pytest.raises(PlaitError):
            METHOD.options(**wrong)
    with pytest.raises(PlaitError, match="too many"):
        llama(rank=2, experts=3, split="row")
    model = tiny.llama()
    plait.attach(model, "lora")
    with pytest.raises(PlaitError, match="method mosa"):
        plait.RuleStack(model, ["mosa"])
    model, _ = llama()
    model.gradient_checkpointing_enable()
    with pytest.raises(PlaitError, match="checkpointing"):
        plait.RuleStack(model, ["mosa"])
    plait.RuleStack(model, [Mosa(kl=0.0)])
