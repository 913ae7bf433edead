"""LoftQ: base and pair chosen together, with a float64 loop of its own as the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait.initializers.loftq import Loftq
from plait.quantization import BlockQuantizer

Q2 = BlockQuantizer(width=2, block=16)


def linear(rank: int = 3, start: Loftq | None = None, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 20)).double()
    W = model[0].weight.data.normal_().clone()
    start = start or Loftq(Q2, svd="exact")
    options = {"rank": rank, "alpha": 5.0, "seed": 2, **options}
    adapter = plait.attach(model, "lora", initializer=start, **options)
    return model, adapter.deltas["0"], W


def by_hand(W, rank, turns):
    """[(Q, change)] of every turn, with numpy's SVD."""
    change, found = torch.zeros_like(W), []
    for _ in range(turns):
        Q = Q2.quantize(W - change)
        U, S, Vh = (torch.from_numpy(x) for x in _svd((W - Q).numpy()))
        change = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        found.append((Q, change))
    return found


def _svd(matrix):
    import numpy

    return numpy.linalg.svd(matrix, full_matrices=False)


@pytest.mark.parametrize("turns", [1, 2, 5])
def test_the_pair_is_that_of_the_best_turn(turns: int) -> None:
    _, delta, W = linear(start=Loftq(Q2, iterations=turns, svd="exact"))
    errors = [(W - Q - change).norm() for Q, change in by_hand(W, 3, turns)]
    _, want = by_hand(W, 3, turns)[errors.index(min(errors))]
    torch.testing.assert_close(delta.trained().dense().detach(), want)


def test_one_turn_leaves_the_tail_of_the_error_s_spectrum() -> None:
    _, delta, W = linear(start=Loftq(Q2, iterations=1, svd="exact"))
    error = W - Q2.quantize(W)
    residual = error - delta.trained().dense().detach()
    tail = torch.linalg.svdvals(error)[3:].square().sum().sqrt()
    torch.testing.assert_close(residual.norm(), tail)
    assert residual.norm() < error.norm()


def test_more_turns_are_never_worse_and_help() -> None:
    gaps = []
    for turns in (1, 3, 10):
        start = Loftq(BlockQuantizer(4), iterations=turns, svd="exact", base="replace")
        model, delta, W = linear(start=start)
        gaps.append(float((W - model[0].weight - delta.dense()).detach().norm()))
    assert gaps[0] > gaps[1] > gaps[2]


def test_the_randomised_svd_finds_nearly_the_same() -> None:
    found = []
    for svd in ("exact", "randomized"):
        model, delta, W = linear(start=Loftq(Q2, svd=svd, base="replace"))
        found.append(float((W - model[0].weight - delta.dense()).detach().norm()))
    assert found[1] < 1.03 * found[0]


def test_by_default_the_base_stays_and_the_model_starts_at_it() -> None:
    model = tiny.llama()
    before, weights = tiny.logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    adapter = plait.attach(model, "loftq", rank=4, seed=0)
    torch.testing.assert_close(tiny.logits(model), before, rtol=1e-4, atol=1e-4)
    losses = tiny.losses(model, adapter)
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_replacing_writes_the_quantised_base_and_the_pair_makes_up_for_it() -> None:
    model, delta, W = linear(start=Loftq(Q2, iterations=1, svd="exact", base="replace"))
    assert torch.equal(model[0].weight, Q2.quantize(W))
    x = torch.randn(7, 24, dtype=torch.float64)
    want = F.linear(x, model[0].weight + delta.dense(), model[0].bias)
    torch.testing.assert_close(model(x), want)
    exact = F.linear(x, W, model[0].bias)
    alone = F.linear(x, model[0].weight, model[0].bias)
    assert (model(x) - exact).norm() < (alone - exact).norm()


def test_a_replaced_base_and_its_adapter_come_back_from_files(tmp_path) -> None:
    model = tiny.llama()
    adapter = plait.attach(model, "lora", initializer=Loftq(Q2, base="replace"), rank=4, seed=0)
    tiny.scramble(adapter)
    wanted = tiny.logits(model)
    adapter.save(tmp_path / "adapter")
    torch.save(model.state_dict(), tmp_path / "base.pt")
    again = tiny.llama()
    again.load_state_dict(torch.load(tmp_path / "base.pt"))
    plait.load(again, tmp_path / "adapter")
    torch.testing.assert_close(tiny.logits(again), wanted, rtol=1e-5, atol=1e-5)


def test_the_start_is_closer_to_the_unquantised_model_than_quantising_alone() -> None:
    model, plain = tiny.llama(), tiny.llama()
    exact = tiny.logits(model)
    plait.attach(model, "lora", initializer=Loftq(Q2, base="replace"), rank=8, seed=0)
    with torch.no_grad():
        for site in plait.find_sites(plain, "all-linear"):
            site.base.weight.copy_(Q2.quantize(site.base.weight))
    assert (tiny.logits(model) - exact).norm() < (tiny.logits(plain) - exact).norm()


def test_on_a_quantised_base_one_svd_finds_the_pair_and_nothing_is_overwritten() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 20)).double()
    W = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.copy_(Q2.quantize(W))
    quantised = model[0].weight.detach().clone()
    start = Loftq(originals={"0": W}, svd="exact")
    delta = plait.attach(model, "lora", initializer=start, rank=3, seed=0).deltas["0"]
    assert torch.equal(model[0].weight, quantised)
    torch.testing.assert_close(delta.dense().detach(), by_hand(W, 3, 1)[0][1])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv2d(4, 6, 3), (2, 4, 7, 7)), (nn.Embedding(20, 6), None)],
    ids=["conv", "embedding"],
)
def test_other_kinds_of_sites_are_replaced_in_their_own_layout(layer, shape) -> None:
    model = nn.Sequential(layer)
    W = layer.weight.detach().clone()
    if shape:
        layer.to(memory_format=torch.channels_last)
    start = Loftq(Q2, iterations=1, base="replace")
    adapter = plait.attach(model, "lora", initializer=start, rank=2, targets=["0"], seed=0)
    canonical = W.flatten(1) if shape else W.t()
    now = layer.weight.flatten(1) if shape else layer.weight.t()
    torch.testing.assert_close(now.detach(), Q2.quantize(canonical))
    gap = (canonical - now - adapter.deltas["0"].dense()).norm()
    assert gap < (canonical - now).norm()


def test_a_rank_above_the_shorter_side_takes_the_whole_error() -> None:
    model, delta, W = linear(rank=22, start=Loftq(Q2, svd="exact", base="replace"))
    torch.testing.assert_close((model[0].weight + delta.dense()).detach(), W)


def test_weights_that_other_adapters_were_made_for_are_not_overwritten() -> None:
    model = tiny.llama()
    plait.attach(model, "lora", rank=2, name="other")
    with pytest.raises(plait.PlaitError, match="'other' was made for"):
        plait.attach(model, "lora", name="a", initializer=Loftq(base="replace"))
    plait.attach(model, "loftq", name="a")


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"iterations": 0}, {"base": "gone"}, {"base": "replace", "originals": {}}):
        with pytest.raises(plait.PlaitError, match="loftq"):
            Loftq(**wrong)
    with pytest.raises(plait.PlaitError, match="originals"):
        linear(start=Loftq(originals={"1": torch.zeros(20, 24)}))
    with pytest.raises(plait.PlaitError, match="pair"):
        plait.attach(tiny.llama(), "vera", initializer="loftq", rank=4)
