"""Block-LoRA: tied blocks against the dense formula, and against LoRA where they coincide."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny


def linear(method="block-lora", rank=4, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 6)).double()
    adapter = plait.attach(model, method, rank=rank, alpha=3.0, seed=2, **options)
    return model, adapter.deltas["0"], adapter


def scrambled(**options):
    model, delta, adapter = linear(**options)
    tiny.scramble(adapter, 0.5)
    return model, delta, adapter


def test_the_start_is_the_base_exactly():
    model = tiny.llama()
    before = tiny.logits(model)
    plait.attach(model, "block-lora")
    assert torch.equal(tiny.logits(model), before)


def test_summed_slices_equal_the_dense_product_with_repeated_blocks():
    model, delta, _ = scrambled(blocks=3)
    W = model[0].weight + 0.75 * delta.B @ torch.cat([delta.A] * 3, 1)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), F.linear(x, W, model[0].bias))
    torch.testing.assert_close(model[0].weight + delta.dense(), W)
    torch.testing.assert_close(delta(x), F.linear(x, delta.dense()))


def test_all_block_columns_are_equal_so_shares_of_a_sum_are_not_seen():
    _, delta, _ = scrambled(blocks=4)
    columns = delta.dense().unflatten(1, (4, 3))
    torch.testing.assert_close(columns, columns[:, :1].expand_as(columns))
    slices = torch.randn(4, 3, dtype=torch.float64)
    swapped = slices[[2, 0, 3, 1]]
    torch.testing.assert_close(delta(slices.reshape(1, 12)), delta(swapped.reshape(1, 12)))


@pytest.mark.parametrize("split", ["input", "rank"])
def test_one_block_is_lora(split):
    model, delta, _ = scrambled(blocks=1, split=split)
    other, lora, _ = linear("lora")
    lora.set_pair(delta.A, delta.B)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), other(x))


def test_gradients_are_loras_summed_over_the_blocks():
    model, delta, _ = scrambled(blocks=3)
    other, lora, _ = linear("lora")
    lora.set_pair(torch.cat([delta.A] * 3, 1), delta.B)
    x, g = (torch.randn(7, n, dtype=torch.float64) for n in (12, 6))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(mine).backward(g)
    other(theirs).backward(g)
    torch.testing.assert_close(delta.A.grad, lora.A.grad.unflatten(1, (3, 4)).sum(1))
    torch.testing.assert_close(delta.B.grad, lora.B.grad)
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_shared_by_parts_of_the_rank_is_the_sum_of_the_arms():
    model, delta, _ = scrambled(blocks=2, split="rank")
    assert delta.A.shape == (2, 12) and delta.B.shape == (6, 4)
    W = model[0].weight + 0.75 * (delta.B[:, :2] + delta.B[:, 2:]) @ delta.A
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), F.linear(x, W, model[0].bias))
    torch.testing.assert_close(model[0].weight + delta.dense(), W)


@pytest.mark.parametrize("split", ["input", "rank"])
def test_both_readings_train_as_many_parameters(split):
    _, delta, adapter = linear(blocks=2, split=split)
    assert adapter.num_parameters() == 4 * (12 // 2 + 6)
    assert adapter.method.count([delta.site], delta.options) == adapter.num_parameters()


def test_backward_keeps_the_sum_and_not_the_input():
    model, _, _ = linear(blocks=4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(torch.randn(100, 12, dtype=torch.float64))
    assert max(shape.numel() for shape in kept) <= 4 * 100


def test_dropout_keeps_the_mean():
    _, delta, _ = scrambled(blocks=3, dropout=0.3)
    x = torch.randn(1, 12, dtype=torch.float64)
    want = delta.eval()(x)
    delta.train()
    got = delta(x.expand(20000, -1)).mean(0)
    torch.testing.assert_close(got, want[0], rtol=0.1, atol=0.05)


def test_blocks_that_do_not_fit_are_refused():
    for options in ({"blocks": 5}, {"blocks": 3, "split": "rank"}):
        with pytest.raises(plait.PlaitError, match="does not divide"):
            linear(**options)
    for options in ({"blocks": 0}, {"split": "output"}):
        with pytest.raises(plait.PlaitError):
            linear(**options)


@pytest.mark.parametrize("split", ["input", "rank"])
def test_training(split):
    model = tiny.llama()
    adapter = plait.attach(model, "block-lora", rank=4, blocks=2, alpha=8, split=split, seed=0)
    losses = tiny.losses(model, adapter)
    assert losses[-1] < 0.7 * losses[0]
