"""Banks: what comes back, how near, and what is stored, against the paper's sums in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import plait
from plait.compression import Bank, make_bank
from plait.errors import PlaitError
from tiny_language_model import tiny_model


def several(count: int, rank: int = 3, alike: float = 0.0, **options: object):
    """Adapters that share a part of size `alike` of what they do."""
    model, found = tiny_model(), []
    common = torch.Generator().manual_seed(99)
    for i in range(count):
        adapter = plait.attach(
            model, "lora", name=f"a{i}", rank=rank, targets=["q_proj", "up_proj"]
        )
        draw = torch.Generator().manual_seed(i)
        common.manual_seed(99)
        for parameter in adapter.parameters():
            shared = alike * torch.randn(parameter.shape, generator=common)
            parameter.data = 0.3 * (torch.randn(parameter.shape, generator=draw) + shared)
        found.append(adapter)
    return found


def gaps(bank: Bank, adapters) -> list[float]:
    found = []
    for adapter in adapters:
        back = bank.adapter(adapter.name)
        for path, delta in adapter.deltas.items():
            exact = delta.dense().detach().double()
            gap = back.deltas[path].dense().detach().double() - exact
            found.append(float(gap.norm() / exact.norm()))
            assert bank.errors[adapter.name][path] == pytest.approx(found[-1], abs=1e-5)
    return found


def test_enough_vectors_give_every_adapter_back() -> None:
    adapters = several(5)
    assert max(gaps(make_bank(adapters, size=3), adapters)) < 1e-5
    few = several(2)
    assert max(gaps(make_bank(few, size=2), few)) < 1e-5


def test_copies_need_one_vector_whatever_their_gauge() -> None:
    first, second = several(2)
    for path, delta in second.deltas.items():
        G = torch.eye(3) + 0.2 * torch.randn(3, 3)
        twin = first.deltas[path]
        delta.set_pair(torch.linalg.solve(G, twin.A.data), twin.B.data @ G)
    assert max(gaps(make_bank([first, second], size=1), [first, second])) < 1e-4


def test_errors_fall_with_the_size_and_what_is_alike_costs_less() -> None:
    adapters, kin = several(6), several(6, alike=3.0)
    errors = [sum(gaps(make_bank(adapters, size=p), adapters)) for p in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)
    assert sum(gaps(make_bank(kin, size=1), kin)) < 0.8 * errors[0]


def test_the_basis_leaves_the_singular_values_beyond_it() -> None:
    bank, whole = (make_bank(several(6), size=p) for p in (2, 3))
    for path, shelf in bank.shelves.items():
        exact = whole.shelves[path]
        X = torch.stack(
            [
                (exact.basis.double() @ c.double()[..., None])[..., 0]
                for c in exact.coefficients.values()
            ],
            -1,
        )
        mine = torch.stack(
            [
                (shelf.basis.double() @ c.double()[..., None])[..., 0]
                for c in shelf.coefficients.values()
            ],
            -1,
        )
        tail = torch.linalg.svdvals(X)[:, 2:].square().sum()
        torch.testing.assert_close((X - mine).square().sum(), tail, rtol=1e-4, atol=0)


def test_stored_numbers_and_the_file(tmp_path: Path) -> None:
    adapters = several(6)
    bank = make_bank(adapters, size=2, dtype=torch.float16)
    positions = sum(sum(shelf.site.shape) for shelf in bank.shelves.values())
    assert bank.num_parameters() == positions * 2 * (3 + 6)
    bank.save(tmp_path / "bank")
    again = Bank.load(tmp_path / "bank")
    assert again.names == [a.name for a in adapters] and again.errors == bank.errors
    for name in again.names:
        for path, delta in again.adapter(name).deltas.items():
            assert torch.equal(delta.dense(), bank.adapter(name).deltas[path].dense())
    gaps(again, adapters)
    with pytest.raises(PlaitError, match="did you mean"):
        again.adapter("a9")


def test_other_sites_and_ranks_fit_in_one_bank() -> None:
    (one,), (two,) = several(1, rank=2), several(1, rank=4)
    two.name = "b"
    two.deltas.pop("model.layers.0.mlp.up_proj")
    bank = make_bank([one, two], size=2)
    assert set(bank.adapter("b").deltas) == set(two.deltas)
    assert max(gaps(bank, [one, two])) < 1e-5
    with pytest.raises(PlaitError, match="name of its own"):
        make_bank([one, one])


def test_one_more_adapter_moves_no_other() -> None:
    *known, late = several(5)
    bank = make_bank(known, size=3)
    before = [bank.adapter(a.name).deltas["model.layers.0.mlp.up_proj"].dense() for a in known]
    bank.add(late)
    assert max(gaps(bank, [late])) < 1e-5  # three vectors span all that rank 3 can be
    for adapter, dense in zip(known, before, strict=True):
        after = bank.adapter(adapter.name).deltas["model.layers.0.mlp.up_proj"].dense()
        assert torch.equal(after, dense)
    with pytest.raises(PlaitError, match="already holds"):
        bank.add(late)
    narrow = make_bank(known, size=1)
    narrow.add(late)
    assert 0.1 < max(gaps(narrow, [late])) < 1.5
    (wide,) = several(1, rank=5)
    wide.name = "wider"
    with pytest.raises(PlaitError, match="no basis"):
        bank.add(wide)
