"""squeeze: against SVDs of the dense change in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import plait
from plait.errors import PlaitError
from plait.statistics import SecondMoment, activation_pass
from tiny_language_model import tiny_model


def trained(
    method: str = "lora", seed: int = 3, **options: object
) -> tuple[torch.nn.Module, plait.Adapter]:
    model = tiny_model()
    adapter = plait.attach(model, method, name="a", **{"rank": 6} | options)
    draw = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        decay = torch.logspace(0, -1, parameter.shape[0])[:, None] if parameter.dim() > 1 else 1
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3 * decay
    return model, adapter


def dense(adapter: plait.Adapter) -> dict[str, Tensor]:
    return {p: d.dense().detach().double() for p, d in adapter.deltas.items()}


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_each_site_is_the_best_approximation_of_its_rank(rank: int) -> None:
    _, adapter = trained()
    small = plait.squeeze(adapter, rank)
    for path, change in dense(adapter).items():
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        delta = small.deltas[path]
        torch.testing.assert_close(delta.dense().detach().double(), best, rtol=0, atol=1e-5)
        lost = float(S[rank:].square().sum() / S.square().sum())
        assert small.info["dropped_energy"][path] == pytest.approx(lost, abs=1e-6)
        # Balanced: both factors carry the same spectrum.
        torch.testing.assert_close(delta.B.mT @ delta.B, delta.A @ delta.A.mT, rtol=0, atol=1e-5)


def test_the_gauge_of_the_factors_does_not_matter() -> None:
    _, adapter = trained()
    before = dense(plait.squeeze(adapter, 2))
    for delta in adapter.deltas.values():
        G = torch.eye(6) + 0.3 * torch.randn(6, 6)
        delta.set_pair(torch.linalg.solve(G, delta.A.data), delta.B.data @ G)
    after = dense(plait.squeeze(adapter, 2))
    for path, change in before.items():
        torch.testing.assert_close(after[path], change, rtol=0, atol=2e-5)


def test_energy_takes_the_fewest_and_a_budget_the_best_for_its_price(tmp_path: Path) -> None:
    _, adapter = trained()
    small = plait.squeeze(adapter, energy=0.95)
    for path, change in dense(adapter).items():
        held = torch.linalg.svdvals(change).square().cumsum(0)
        assert small.deltas[path].rank == int((held < 0.95 * held[-1]).sum()) + 1
    even = plait.squeeze(adapter, 2)
    spent = plait.squeeze(adapter, budget=even.num_parameters())
    assert spent.num_parameters() <= even.num_parameters()
    assert len({d.rank for d in spent.deltas.values()}) > 1

    def error(other: plait.Adapter) -> float:
        mine, zero = dense(other), torch.zeros(())
        gaps = [c - mine.get(p, zero) for p, c in dense(adapter).items()]
        return sum(float(gap.square().sum()) for gap in gaps)

    assert error(spent) < error(even)
    spent.save(tmp_path / "spent")
    again = plait.read_adapter(tmp_path / "spent")
    assert {p: d.rank for p, d in again.deltas.items()} == {
        p: d.rank for p, d in spent.deltas.items()
    }


def test_weighted_by_the_inputs_the_outputs_are_nearest() -> None:
    model, adapter = trained(targets=["q_proj", "up_proj", "down_proj"])
    sites = [d.site for d in adapter.deltas.values()]
    batches = [{"input_ids": torch.arange(40).reshape(2, 20) * 3 % 258}]
    moments = activation_pass(model, sites, batches, SecondMoment(), active=["a"])
    plain = dense(plait.squeeze(adapter, 2))
    aware = plait.squeeze(adapter, 2, inputs=moments)
    for path, change in dense(adapter).items():
        values, vectors = torch.linalg.eigh(moments[path].double())
        root = vectors * values.clamp_min(0).sqrt()
        S = torch.linalg.svdvals(change @ root)
        best = float(S[2:].square().sum())
        mine = aware.deltas[path].dense().detach().double()
        assert float(((change - mine) @ root).square().sum()) == pytest.approx(best, rel=1e-3)
        assert best < float(((change - plain[path]) @ root).square().sum())
        share = best / float(S.square().sum())
        assert aware.info["dropped_energy"][path] == pytest.approx(share, rel=1e-3)
    with pytest.raises(PlaitError, match=r"\[32, 32\]"):
        plait.squeeze(adapter, 2, inputs={sites[0].path: torch.eye(5)})


def test_any_linear_method_and_what_stands_beside_it() -> None:
    _, adapter = trained("dora", train_modules=["lm_head"], targets=["q_proj", "v_proj"])
    exact = {p: adapter.deltas[p].dense().detach().double() for p in adapter.deltas if "proj" in p}
    small = plait.squeeze(adapter, energy=1.0)
    for path, change in exact.items():
        torch.testing.assert_close(
            small.deltas[path].dense().detach().double(), change, rtol=0, atol=1e-4
        )
    head = small.deltas["lm_head"].tensors()["weight"]
    torch.testing.assert_close(head, adapter.deltas["lm_head"].tensors()["weight"])


def test_biases_come_along_and_idle_components_go() -> None:
    _, adapter = trained(bias=True)
    idle = adapter.deltas["model.layers.0.self_attn.q_proj"]
    idle.B.data.zero_()
    small = plait.squeeze(adapter, 4)
    assert small.deltas[idle.site.path].rank == 0
    for path, delta in adapter.deltas.items():
        torch.testing.assert_close(small.deltas[path].bias(), delta.bias())


def test_one_way_to_cut_must_be_given() -> None:
    _, adapter = trained()
    with pytest.raises(PlaitError, match="none of them"):
        plait.squeeze(adapter)
    with pytest.raises(PlaitError, match="not rank and budget"):
        plait.squeeze(adapter, 2, budget=100)
