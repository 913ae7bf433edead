"""Joint bases: against Tucker decompositions of dense float64 stacks written here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_bank import gaps, several
from torch import Tensor

import plait
from plait.compression import Bank, joint_bank, make_bank
from plait.errors import PlaitError

SITE = "model.layers.0.mlp.up_proj"


def dense(adapters) -> dict[str, Tensor]:
    """{site: [n, out, in]} of exact changes."""
    paths = adapters[0].deltas
    return {
        p: torch.stack([a.deltas[p].dense().detach().double() for a in adapters]) for p in paths
    }


def restored(bank: Bank) -> dict[str, Tensor]:
    return dense([bank.adapter(name) for name in bank.names])


def hosvd(stack: Tensor, size: int) -> Tensor:
    """What the leading eigenvectors of the two Gram matrices keep of each change."""
    U = torch.linalg.eigh(sum(M @ M.T for M in stack)).eigenvectors.flip(1)[:, :size]
    V = torch.linalg.eigh(sum(M.T @ M for M in stack)).eigenvectors.flip(1)[:, :size]
    return U @ (U.T @ stack @ V) @ V.T


def als(stack: Tensor, size: int, rounds: int) -> Tensor:
    V = torch.linalg.eigh(sum(M.T @ M for M in stack)).eigenvectors.flip(1)[:, :size]
    for _ in range(rounds):
        U = torch.linalg.svd(torch.cat([M @ V for M in stack], 1))[0][:, :size]
        V = torch.linalg.svd(torch.cat([M.T @ U for M in stack], 1))[0][:, :size]
    return U @ (U.T @ stack @ V) @ V.T


def test_the_sum_of_the_ranks_gives_every_adapter_back() -> None:
    adapters = [*several(2, rank=2), *several(5, rank=4)[2:]]
    bank = joint_bank(adapters, rank=16)
    assert max(gaps(bank, adapters)) < 2e-6
    for adapter in adapters:  # as LoRAs of the ranks that they came with
        back = bank.adapter(adapter.name)
        assert {d.rank for d in back.deltas.values()} == {adapter.options.rank}
    assert max(gaps(joint_bank(adapters, energy=1.0), adapters)) < 2e-6
    assert min(gaps(joint_bank(adapters, rank=15), adapters)) > 1e-4


@pytest.mark.parametrize("size", [2, 5, 11])
def test_hosvd_is_the_dense_one(size: int) -> None:
    adapters = several(5)
    bank = joint_bank(adapters, rank=size, rounds=0)
    for path, stack in dense(adapters).items():
        expected = hosvd(stack, size)
        mine = restored(bank)[path]
        assert float((mine - expected).norm() / expected.norm()) < 1e-5
        lost = (stack - expected).flatten(1).norm(dim=1) / stack.flatten(1).norm(dim=1)
        for adapter, error in zip(adapters, lost.tolist(), strict=True):
            assert bank.errors[adapter.name][path] == pytest.approx(error, rel=1e-5)


def test_als_is_the_dense_one_and_never_loses_more() -> None:
    adapters = several(5, alike=0.5)
    losses = []
    for rounds in (0, 1, 3):
        bank, lost = joint_bank(adapters, rank=4, rounds=rounds), 0.0
        for path, stack in dense(adapters).items():
            gap = restored(bank)[path] - stack
            lost += float(gap.square().sum())
            if rounds:
                expected = als(stack, 4, rounds) - stack
                assert float(gap.norm()) == pytest.approx(float(expected.norm()), rel=1e-4)
        losses.append(lost)
    assert losses[0] > losses[1] >= losses[2] * (1 - 1e-6)


def test_gauges_do_not_matter() -> None:
    adapters, turned = several(4), several(4)
    for adapter in turned:
        for delta in adapter.deltas.values():
            G = torch.eye(3) + 0.3 * torch.randn(3, 3)
            delta.set_pair(torch.linalg.solve(G, delta.A.data), delta.B.data @ G)
    one, two = (restored(joint_bank(some, rank=5)) for some in (adapters, turned))
    for path, value in one.items():
        torch.testing.assert_close(value, two[path], rtol=1e-3, atol=1e-4)


def test_adapters_that_share_their_spaces_need_no_more_than_these() -> None:
    adapters = several(6)
    first = adapters[0]
    for adapter in adapters[1:]:
        for path, delta in adapter.deltas.items():
            twin = first.deltas[path]
            delta.set_pair(torch.randn(3, 3) @ twin.A.data, twin.B.data @ torch.randn(3, 3))
    bank = joint_bank(adapters, rank=3)
    assert max(gaps(bank, adapters)) < 1e-5
    shelf = bank.shelves[SITE]
    assert bank.shelves[SITE].num_parameters() == sum(shelf.site.shape) * 3 + 6 * 9


def test_energy_takes_the_smallest_size_that_keeps_it() -> None:
    adapters = several(5, alike=1.0)
    bank = joint_bank(adapters, energy=0.8, rounds=0)
    for path, stack in dense(adapters).items():
        size = bank.shelves[path].U.shape[1]
        kept = [
            float(hosvd(stack, p).square().sum() / stack.square().sum()) for p in (size - 1, size)
        ]
        assert kept[0] < 0.8 <= kept[1] + 1e-9


def test_a_budget_is_kept_and_spent_where_it_holds_most() -> None:
    adapters = several(4)
    for adapter in adapters:
        adapter.deltas[SITE].B.data *= 10
    budget = 3000
    bank = joint_bank(adapters, budget=budget)
    assert budget - 700 < bank.num_parameters() <= budget
    sizes = {path: shelf.U.shape[1] for path, shelf in bank.shelves.items()}
    assert max(sizes, key=sizes.__getitem__) == SITE


@pytest.mark.parametrize("bits", [None, 4, 1])
def test_the_file(bits: int | None, tmp_path: Path) -> None:
    adapters = several(6)
    adapters[0].info["base"] = "tiny"
    bank = joint_bank(adapters, rank=6, bits=bits, dtype=torch.float16)
    bank.save(tmp_path / "bank")
    assert sorted(p.name for p in (tmp_path / "bank").iterdir()) == [
        "bank.json",
        "bank.safetensors",
    ]
    again = Bank.load(tmp_path / "bank")
    assert again.names == bank.names and again.errors == bank.errors
    assert again.adapter("a0").info["base"] == "tiny"
    for path, value in restored(bank).items():
        assert torch.equal(restored(again)[path], value)
    gaps(again, adapters)
    again.save(tmp_path / "again")
    files = [(tmp_path / n / "bank.safetensors").read_bytes() for n in ("bank", "again")]
    assert files[0] == files[1]
    bases = sum(sum(shelf.site.shape) for shelf in bank.shelves.values()) * 6 * 2
    cores = 6 * 36 * len(bank.shelves) * (2 if bits is None else bits / 8)
    scales = 0 if bits is None else 6 * 36 / 6 * len(bank.shelves) * 2
    header = int.from_bytes(files[0][:8], "little") + 8
    assert len(files[0]) - header <= bases + cores + scales + 8 * 6 * len(bank.shelves)


def test_bits_cost_what_the_errors_say() -> None:
    adapters = several(6)
    means = []
    for bits in (None, 8, 4, 2, 1):
        bank = joint_bank(adapters, rank=18, bits=bits)
        means.append(sum(gaps(bank, adapters)))
    assert means == sorted(means) and means[1] < 0.02 * means[4]


def test_one_more_adapter_moves_no_other() -> None:
    *known, late = several(5)
    bank = joint_bank(known, rank=6)
    before = restored(bank)
    errors = bank.add(late)
    for path, shelf in bank.shelves.items():
        change = late.deltas[path].dense().detach().double()
        U, V = shelf.U.double(), shelf.V.double()
        best = U @ (U.T @ change @ V) @ V.T
        assert errors[path] == pytest.approx(
            float((change - best).norm() / change.norm()), rel=1e-4
        )
        assert torch.equal(restored(bank)[path][:4], before[path])
    with pytest.raises(PlaitError, match="already holds"):
        bank.add(late)


def test_at_equal_size_kin_are_cheaper_than_ranks_cut_one_by_one() -> None:
    """The comparison that a bank has to stand: every adapter cut to a lower rank on its own."""
    kin = several(8, rank=4, alike=3.0)
    bank = joint_bank(kin, rank=6)
    alone = [plait.squeeze(adapter, budget=bank.num_parameters() // 8) for adapter in kin]
    ours = sum(e**2 for errors in bank.errors.values() for e in errors.values())
    theirs = sum(s for a in alone for s in a.info["dropped_energy"].values())
    assert ours < 0.8 * theirs


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    adapters = several(2)
    with pytest.raises(PlaitError, match="rank=, energy= and budget="):
        joint_bank(adapters)
    with pytest.raises(PlaitError, match="bits 1 to 8"):
        joint_bank(adapters, rank=2, bits=9)
    with pytest.raises(PlaitError, match="name of its own"):
        joint_bank([adapters[0], adapters[0]], rank=2)
    joint_bank(adapters, rank=2).save(tmp_path / "bank")
    file = tmp_path / "bank" / "bank.json"
    text = file.read_text()
    file.write_text(text.replace('"joint"', '"jiont"'))
    with pytest.raises(PlaitError, match="jiont"):
        Bank.load(tmp_path / "bank")
    file.write_text(text.replace('"ranks"', '"rinks"'))
    with pytest.raises(PlaitError, match="ranks"):
        Bank.load(tmp_path / "bank")
    positions = make_bank(adapters, size=1).save(tmp_path / "positions")
    assert Bank.load(positions).names == ["a0", "a1"]
