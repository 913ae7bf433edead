"""Ranks that change during training: what dW, the parameters and Adam's moments become."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import plait
from plait.adapter import PairDelta
from plait.testing import make_model
from plait.testing.models import get_subject


def trained(
    rank: int = 4, **options: object
) -> tuple[torch.nn.Module, PairDelta, torch.optim.Adam]:
    """A model with a LoRA on its head, after a few Adam steps."""
    model = make_model("linear")
    adapter = plait.attach(model, "lora", rank=rank, targets=["head"], seed=1, **options)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    for step in range(4):
        loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = adapter.deltas["head"]
    assert isinstance(delta, PairDelta)
    return model, delta, optimizer


def loss(model: torch.nn.Module, seed: int) -> Tensor:
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed))
    return model(x).logits.square().sum()


def test_keep_slices_the_pair_and_its_moments() -> None:
    _, delta, optimizer = trained(alpha=3)
    A, B, scaling = delta.A.clone(), delta.B.clone(), delta.scaling
    moments = {n: dict(optimizer.state[getattr(delta, n)]) for n in "AB"}
    index = [2, 0]
    delta.keep(index, optimizer)
    assert torch.equal(delta.A, A[index]) and torch.equal(delta.B, B[:, index])
    assert delta.rank == 2 and delta.scaling == scaling
    torch.testing.assert_close(delta.dense(), scaling * B[:, index] @ A[index])
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[delta.A][key], moments["A"][key][index])
        assert torch.equal(optimizer.state[delta.B][key], moments["B"][key][:, index])
    assert optimizer.state[delta.A]["step"] == 4


@pytest.mark.parametrize("rslora", [False, True])
def test_grow_leaves_dw_and_continues_the_old_moments(rslora: bool) -> None:
    _, delta, optimizer = trained(rank=2, rslora=rslora)
    before, A, scaling = delta.dense().clone(), delta.A.clone(), delta.scaling
    moment = optimizer.state[delta.A]["exp_avg"].clone()
    delta.grow(3, optimizer)
    assert delta.rank == 5 and math.isclose(delta.scaling, scaling)
    torch.testing.assert_close(delta.dense(), before, atol=1e-7, rtol=1e-6)
    assert torch.equal(delta.A[:2], A) and not bool(delta.B[:, 2:].any())
    assert bool(delta.A[2:].any(1).all()), "a new component with A = 0 and B = 0 can never move"
    state = optimizer.state[delta.A]
    assert torch.equal(state["exp_avg"][:2], moment) and not bool(state["exp_avg"][2:].any())
    assert state["exp_avg"].shape == delta.A.shape == (5, 12)


def test_training_goes_on_with_the_new_parameters_and_only_those() -> None:
    model, delta, optimizer = trained()
    old = [delta.A, delta.B]
    delta.grow(2, optimizer)
    delta.keep([0, 4, 5], optimizer)
    now = [p for g in optimizer.param_groups for p in g["params"]]
    assert [id(p) for p in now] == [id(delta.A), id(delta.B)]
    assert set(optimizer.state) == set(now) and not set(now) & set(old)
    before = delta.B.detach().clone()
    start = float(loss(model, 0).detach())
    for _ in range(30):
        loss(model, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss(model, 0).detach()) < 0.9 * start
    assert bool((delta.B - before)[:, 1:].any()), "the grown components do not learn"


def test_a_kept_component_steps_as_if_the_others_had_never_been() -> None:
    """With a loss that sees components one by one, keep and step equals step and keep."""

    def run(keep_first: bool) -> tuple[Tensor, Tensor]:
        _, delta, optimizer = trained()
        if keep_first:
            delta.keep([1, 3], optimizer)
        for _ in range(3):
            (delta.A.pow(2).sum() + delta.B.pow(4).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        if not keep_first:
            delta.keep([1, 3], optimizer)
        return delta.A.detach(), delta.B.detach()

    for early, late in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(early, late)


def test_the_output_of_the_model_follows() -> None:
    model, delta, optimizer = trained()
    x = torch.randn(3, 12)
    before = model(x).logits
    delta.grow(4, optimizer)
    torch.testing.assert_close(model(x).logits, before, atol=1e-5, rtol=1e-5)
    delta.keep([], optimizer)
    assert torch.equal(model(x).logits, make_model("linear")(x).logits)
    assert not bool(delta.dense().any())


def test_growing_is_seeded() -> None:
    grown = []
    for noise in (1, 2):
        _, delta, _ = trained()
        torch.manual_seed(noise)
        delta.grow(2)
        grown.append(delta.A.detach())
    assert torch.equal(*grown)


def test_described_options_make_the_same_shapes() -> None:
    _, delta, optimizer = trained(rank=4, alpha=8)
    delta.grow(1, optimizer)
    described = delta.described_options()
    assert described["rank"] == 5 and described["alpha"] / 5 == 2.0


def test_resizing_a_frozen_parameter_keeps_it_frozen() -> None:
    _, delta, optimizer = trained()
    delta.A.requires_grad_(False)
    delta.keep([0], optimizer)
    assert not delta.A.requires_grad and delta.B.requires_grad


def test_a_site_pruned_to_rank_zero_grows_again_with_its_scaling():
    model = nn.Sequential(nn.Linear(6, 5))
    adapter = plait.attach(model, "lora", targets=["0"], rank=4, alpha=12, seed=0)
    delta = adapter.deltas["0"]
    delta.keep([])
    assert model(torch.randn(2, 6)).shape == (2, 5)
    delta.grow(2)
    assert delta.scaling == 3.0


def test_packed_experts_keep_and_grow_the_components_of_every_expert() -> None:
    model = make_model("parameter")
    adapter = plait.attach(model, "lora", rank=4, seed=1, targets=get_subject("parameter").targets)
    delta = next(iter(adapter.deltas.values()))
    assert isinstance(delta, PairDelta) and delta.A.dim() == 3
    optimizer = torch.optim.Adam(adapter.parameters())
    with torch.no_grad():
        delta.B.normal_()
    delta.dense().square().sum().backward()
    optimizer.step()
    A, B, moment = delta.A.clone(), delta.B.clone(), optimizer.state[delta.B]["exp_avg"].clone()
    delta.keep([3, 1], optimizer)
    assert delta.rank == 2 and len(delta.A) == len(A)
    assert torch.equal(delta.A, A[:, [3, 1]]) and torch.equal(delta.B, B[..., [3, 1]])
    assert torch.equal(optimizer.state[delta.B]["exp_avg"], moment[..., [3, 1]])
    before = delta.dense().detach()
    delta.grow(3, optimizer)
    assert delta.A.shape[-2:] == (5, A.shape[-1]) and delta.A[:, 2:].all()
    torch.testing.assert_close(delta.dense().detach(), before)
