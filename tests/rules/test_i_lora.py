"""I-LoRA: the two memories, the replayed loss written out by hand, and the memory of rows."""

from __future__ import annotations

import copy

import pytest
import torch
from rule_models import batches, make_stack, randomise, train
from torch import Tensor, nn

import plait
from plait.errors import FormatError
from plait.rules._block_outputs import shortfall
from plait.rules._reservoir import Reservoir
from plait.rules.i_lora import ILora
from plait.testing import RuleCase
from plait.testing.models import tiny_llama


def make(rule, steps: int = 8, lr: float = 1e-2, **options):
    model = make_stack().train()
    adapter = plait.attach(
        model, "lora", rank=3, alpha=6, targets=r"layers\.\d\.(up|down)", seed=0, **options
    )
    return model, adapter, plait.RuleStack(model, [rule], lr=lr, total_steps=steps, seed=5)


def parameters_of(adapter) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in adapter.named_parameters()}


def history(rule, steps: int = 6):
    model, adapter, run = make(rule)
    states = [parameters_of(adapter)]
    longs = []
    for ids in batches(steps):
        train(model, run, [ids])
        states.append(parameters_of(adapter))
        longs.append(rule.average())
    return states, longs


def test_decay_zero_follows_and_decay_one_is_the_mean_from_the_start_on() -> None:
    states, longs = history(ILora(decay=0.0))
    for state, long in zip(states[1:], longs, strict=True):
        assert all(torch.equal(long[n], state[n]) for n in state)
    states, longs = history(ILora(decay=1.0))
    for k, long in enumerate(longs, 1):
        for n in states[0]:
            want = torch.stack([s[n] for s in states[: k + 1]]).mean(0)
            torch.testing.assert_close(long[n], want, atol=1e-12, rtol=0)


def test_the_long_term_memory_is_the_papers_recursion_and_slows_down() -> None:
    states, longs = history(ILora(decay=0.6))
    for n in states[0]:
        long = states[0][n]
        for k in range(1, 7):
            a = min(1 - 1 / (k + 1), 0.6)
            long = a * long + (1 - a) * states[k][n]
            torch.testing.assert_close(longs[k - 1][n], long, atol=1e-12, rtol=0)


def test_the_long_term_memory_takes_no_part_in_training() -> None:
    rule = ILora(decay=0.9)
    model, adapter, run = make(rule)
    held = [p for g in run.optimizer.param_groups for p in g["params"]]
    train(model, run, batches(4))
    assert {id(p) for p in held} == {id(p) for p in adapter.parameters()}
    assert not any(t.requires_grad for t in rule._long)
    other = make_stack().train()
    alone = plait.attach(other, "lora", rank=3, alpha=6, targets=r"layers\.\d\.(up|down)", seed=0)
    train(other, plait.RuleStack(other, [], lr=1e-2), batches(4))
    for name, p in alone.named_parameters():  # no replay: a first task is plain training
        assert torch.equal(p, dict(adapter.named_parameters())[name])


def states_of(model, ids: Tensor) -> list[Tensor]:
    """Outputs of the blocks of a Stack, computed by hand."""
    x, found = model.embed(ids), []
    for layer in model.layers:
        x = layer(x)
        found.append(x)
    return found


def test_a_replayed_step_has_the_papers_gradient() -> None:
    rule = ILora(decay=0.9, gamma=0.7, from_step=2, memory=50)
    model, adapter, run = make(rule)
    randomise(adapter)
    data = batches(4)
    train(model, run, data[:2])
    (model(data[2]) + run.extra_loss()).backward()
    found = {n: p.grad.clone() for n, p in adapter.named_parameters()}
    rule._drawn = 0  # the same rows again: a function of seed and step
    (replayed,), _ = rule._draw(((data[2],), {}))
    seen = torch.cat(data[:2])
    assert all(any(torch.equal(row, s) for s in seen) for row in replayed)
    assert len({tuple(r.tolist()) for r in replayed}) == len(replayed) == len(data[2])
    for p in adapter.parameters():
        p.grad = None
    working = parameters_of(adapter)
    adapter.load_state_dict(rule.average())
    with torch.no_grad():
        high = [h.clone() for h in states_of(model, replayed)]
    adapter.load_state_dict(working)
    low = states_of(model, replayed)
    gap = torch.stack(
        [(torch.maximum(a, b) - a).square().mean() for a, b in zip(low, high, strict=True)]
    )
    (0.5 * (model(data[2]) + model(replayed)) + 0.7 * gap.mean()).backward()
    for name, p in adapter.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-12, rtol=1e-9)


def test_shortfall_is_zero_when_equal_and_pulls_up_only() -> None:
    g = torch.Generator().manual_seed(0)
    high = [torch.randn(2, 5, 3, generator=g) for _ in range(4)]
    assert float(shortfall(high, high, None)) == 0
    low = [torch.randn(2, 5, 3, generator=g).requires_grad_() for _ in range(4)]
    loss = shortfall(low, high, None)
    want = nn.functional.mse_loss(
        torch.stack(low), torch.maximum(torch.stack(low), torch.stack(high))
    )
    torch.testing.assert_close(loss, want)
    loss.backward()
    for a, b in zip(low, high, strict=True):
        assert ((a.grad < 0) == (b > a)).all() and (a.grad[b <= a] == 0).all()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    kept = mask.bool()
    want = shortfall([a[kept] for a in low], [b[kept] for b in high], None)
    torch.testing.assert_close(shortfall(low, high, mask), want)


def test_modes_weights_and_hooks_are_what_they_were_after_a_replay() -> None:
    rule = ILora(decay=0.9, from_step=1)
    model, adapter, run = make(rule, dropout=0.2)
    model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    train(model, run, batches(2))
    working = parameters_of(adapter)
    storages = [p.data_ptr() for p in adapter.parameters()]
    model(batches(3)[2])
    run.extra_loss()
    assert [m.training for m in model.modules()] == modes
    assert [p.data_ptr() for p in adapter.parameters()] == storages
    assert all(torch.equal(p, working[n]) for n, p in adapter.named_parameters())
    assert not any(m._forward_hooks for m in model.layers)
    with torch.no_grad():
        model(batches(3)[2])
    assert run.extra_loss() == 0.0  # an evaluation in between is no batch
    run.finish()
    assert not model._forward_hooks


@pytest.mark.parametrize("use", ["long_term", "working"])
def test_what_the_adapter_is_at_the_end(use: str) -> None:
    rule = ILora(decay=0.9, use=use)
    model, adapter, run = make(rule)
    train(model, run, batches(4))
    working, long = parameters_of(adapter), rule.average()
    run.finish()
    for name, p in adapter.named_parameters():
        assert torch.equal(p, long[name] if use == "long_term" else working[name])
        assert not torch.equal(long[name], working[name])


def test_every_row_stays_with_the_same_probability() -> None:
    """Chi-square over 400 reservoirs of 5 out of 25 rows, given in batches of 4 and less."""
    count, size, trials = 25, 5, 400
    hits = torch.zeros(count)
    for seed in range(trials):
        memory = Reservoir(size, seed)
        for part in torch.arange(count).split(4):
            memory.add(((part,), {}))
        assert memory.seen == count and len(memory) == size
        hits[[int(row["0"]) for row in memory.rows]] += 1
    expected = trials * size / count
    # Sampling without replacement shrinks the variance by (1 - size/count).
    chi2 = float(((hits - expected) ** 2 / expected).sum()) / (1 - size / count)
    assert chi2 < 51.2  # 99.9 % point of chi-square with 24 degrees of freedom


def test_micro_batches_fill_the_same_memory_as_the_whole_batch() -> None:
    whole, parts = Reservoir(3, 7), Reservoir(3, 7)
    for ids in batches(5):
        whole.add(((ids,), {}))
        for piece in ids.split(1):
            parts.add(((piece,), {}))
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert torch.equal(one["0"], other["0"])


def test_rows_of_several_lengths_are_padded_and_what_is_derived_is_left_out() -> None:
    memory = Reservoir(9, 0)
    for length in (3, 5):
        ids = torch.arange(1, 1 + 2 * length).reshape(2, length)
        memory.add(
            (
                (),
                {
                    "input_ids": ids,
                    "labels": ids,
                    "attention_mask": torch.ones_like(ids),
                    "logits_to_keep": torch.tensor([0, 1]),
                    "num_items_in_batch": torch.tensor(7),
                },
            )
        )
    like = ((), {"input_ids": ids, "use_cache": False, "num_items_in_batch": torch.tensor(7)})
    args, kwargs = memory.batch([0, 3], like, torch.device("cpu"))
    assert args == () and kwargs.pop("use_cache") is False
    assert {n: t.tolist() for n, t in kwargs.items()} == {
        "input_ids": [[1, 2, 3, 0, 0], [6, 7, 8, 9, 10]],
        "labels": [[1, 2, 3, -100, -100], [6, 7, 8, 9, 10]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
    }
    memory.add(((), {"pixels": torch.zeros(1, 2, 2)}))
    with pytest.raises(plait.PlaitError, match="not called alike"):
        memory.batch([0, 4], like, torch.device("cpu"))


def test_replaying_a_padded_row_costs_what_the_row_alone_costs() -> None:
    model = tiny_llama().double().eval()
    ids = torch.randint(1, 30, (1, 4), generator=torch.Generator().manual_seed(0))
    memory = Reservoir(2, 0)
    for row in (ids, torch.cat([ids, ids], 1)):
        memory.add(((), {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}))
    _, kwargs = memory.batch([0, 1], ((), {}), torch.device("cpu"))
    logits = model(**kwargs).logits
    torch.testing.assert_close(logits[0, :4], model(input_ids=ids).logits[0])


def test_the_memory_goes_from_run_to_run_in_a_file_that_is_whole_or_not_there(
    tmp_path, monkeypatch
) -> None:
    file = tmp_path / "tasks" / "memory.safetensors"
    options = {"memory_file": str(file), "memory": 4}
    rule = ILora(**options)
    model, _, run = make(rule)
    train(model, run, batches(3))
    assert not file.exists()
    run.finish()
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    later = ILora(**options)
    model, _, run = make(later)
    assert later._rows.seen == 9 and later._steps == 3 and len(later._rows) == 4
    for one, other in zip(rule._rows.rows, later._rows.rows, strict=True):
        assert torch.equal(one["0"], other["0"])
    model(batches(1)[0])
    assert isinstance(run.extra_loss(), Tensor)  # there is something to replay at once

    def fails(tensors, path, metadata) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    before = file.read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(FormatError, match=r"disk full; what was there is intact"):
        run.finish()
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1
    smaller = ILora(memory=2, memory_file=str(file))
    make(smaller)
    kept = {tuple(r["0"].tolist()) for r in smaller._rows.rows}
    assert len(kept) == 2 and kept < {tuple(r["0"].tolist()) for r in rule._rows.rows}


@pytest.mark.parametrize("half", [2, 5])
def test_resuming_gives_the_same_trajectory(half: int) -> None:
    rule = lambda: ILora(decay=0.8, from_step=3, memory=5)  # noqa: E731
    whole = rule()
    model, adapter, run = make(whole)
    train(model, run, batches(8))
    first, early, run = make(rule())
    train(first, run, batches(8)[:half])
    saved = copy.deepcopy([early.state_dict(), run.optimizer.state_dict(), run.state_dict()])
    other = rule()
    second, late, run = make(other)
    late.load_state_dict(saved[0])
    run.optimizer.load_state_dict(saved[1])
    run.load_state_dict(saved[2])
    train(second, run, batches(8)[half:])
    for name, value in adapter.state_dict().items():
        assert torch.equal(late.state_dict()[name], value)
        assert torch.equal(other.average()[name], whole.average()[name])


def test_an_earlier_task_is_kept_better_than_without_replay() -> None:
    """Two tasks of one batch each; the first one's loss after the second."""
    first, second = batches(2)
    left = []
    for rules in ([], [ILora(decay=0.25, from_step=40, memory=3)]):
        model = make_stack().train()
        plait.attach(model, "lora", rank=4, targets=r"layers\.\d\.(up|down)", seed=0)
        run = plait.RuleStack(model, rules, lr=1e-2, total_steps=80, seed=5)
        train(model, run, [first] * 40 + [second] * 40)
        left.append(float(model(first).detach()))
    assert left[1] < left[0] - 0.1


def test_routers_losses_stay_those_of_the_batch() -> None:
    case = RuleCase(plait.get_method("i-lora"))
    found = []
    for start in (99, 1):
        model = case.model()
        adapter = plait.attach(model, "mixlora", seed=0, **plait.get_method("mixlora").example)
        run = plait.RuleStack(model, [ILora(from_step=start)], lr=1e-2, seed=5)
        batch = case.batches(2)
        (model(**batch[0]).loss + run.extra_loss()).backward()
        run.step()
        model(**batch[1])
        run.rules[0].extra_loss()
        found.append(adapter.auxiliary_loss())
    assert torch.equal(*found)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(plait.PlaitError, match="decay"):
        ILora(decay=2)
    with pytest.raises(plait.PlaitError, match="long_term, working"):
        ILora(use="both")
    model = nn.Sequential(nn.Linear(3, 3))
    plait.attach(model, "lora", rank=1, targets="all-linear")
    with pytest.raises(plait.PlaitError, match="gamma"):
        plait.RuleStack(model, ["i-lora"])
