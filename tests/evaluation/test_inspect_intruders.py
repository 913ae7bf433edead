"""Intruder dimensions against full float64 singular value decompositions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import plait
from damaged import deep_model, lora, save_base, site
from plait.errors import PlaitError
from plait.evaluation import IntruderSearch, inspect_adapter
from plait.evaluation.inspection import find_intruders
from plait.linalg import LowRank


def base_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Singular values that fall off as a trained weight's do."""
    draw = torch.Generator().manual_seed(seed)
    short = min(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, short, generator=draw)).Q
    V = torch.linalg.qr(torch.randn(columns, short, generator=draw)).Q
    return U * (torch.arange(1, short + 1).float() ** -0.5 * 5) @ V.T


def oracle(W: torch.Tensor, dense: torch.Tensor, top: int, threshold: float) -> list[int]:
    U = np.linalg.svd(W.double().numpy(), full_matrices=False)[0]
    Y = np.linalg.svd((W + dense).double().numpy(), full_matrices=False)[0][:, :top]
    return np.flatnonzero(np.abs(U.T @ Y).max(0) < threshold).tolist()


def orthogonal_to(U: torch.Tensor, count: int, seed: int = 5) -> torch.Tensor:
    """Directions spread evenly over all of U's, so that they resemble none of them."""
    mixed = torch.randn(U.shape[1], count, generator=torch.Generator().manual_seed(seed)).sign()
    return torch.linalg.qr(U @ mixed).Q


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (128, 128)])
@pytest.mark.parametrize("planted", [0, 1, 2])
def test_planted_intruders_are_found(shape: tuple[int, int], planted: int) -> None:
    W = base_weight(*shape)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    B = orthogonal_to(U, 2)[:, :planted] * torch.tensor([7.0, 4.2])[:planted]
    change = LowRank(B=B, A=orthogonal_to(Vh.T, 2, 6)[:, :planted].T.contiguous())
    found = find_intruders(W, change, IntruderSearch())
    expected = oracle(W, change.dense(), 10, 0.5)
    assert found.indices == expected and len(expected) == planted == found.count
    assert found.exact and len(found.cosines) == 10


@pytest.mark.parametrize("seed", range(6))
def test_random_changes_agree_with_the_oracle(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    W = base_weight(120, 90, seed)
    size = [0.01, 0.1, 0.3, 1.0, 3.0, 10.0][seed]
    change = LowRank(
        B=size * torch.randn(120, 6, generator=draw), A=0.1 * torch.randn(6, 90, generator=draw)
    )
    found = find_intruders(W, change, IntruderSearch(top=8, threshold=0.6))
    assert found.indices == oracle(W, change.dense(), 8, 0.6)


def test_a_direction_of_the_base_that_was_small_is_no_intruder() -> None:
    W = base_weight(100, 100)
    U, _, Vh = torch.linalg.svd(W)
    change = LowRank(B=U[:, 90:91] * 9, A=Vh[90:91])  # far beyond the leading vectors
    found = find_intruders(W, change, IntruderSearch())
    assert found.indices == [] == oracle(W, change.dense(), 10, 0.5)


def test_a_dense_change() -> None:
    W = base_weight(80, 60)
    change = 0.3 * torch.randn(80, 60, generator=torch.Generator().manual_seed(0))
    found = find_intruders(W, change, IntruderSearch())
    assert found.indices == oracle(W, change, 10, 0.5)


def test_an_adapter_beside_a_checkpoint_read_site_by_site(tmp_path: Path) -> None:
    model = deep_model(num_hidden_layers=3)
    where = site(1, "down_proj")
    adapter = lora(model, size=0.002)
    W = model.get_submodule(where).weight.detach()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    delta = adapter.deltas[where]
    delta.B.data[:, 0] = orthogonal_to(U, 1)[:, 0] * 3 * S[0]
    delta.A.data[0] = orthogonal_to(Vh.T, 1)[:, 0]
    folder = save_base(model, tmp_path / "base")
    by_file = inspect_adapter(adapter, folder, intruders=IntruderSearch())
    for report in (by_file, inspect_adapter(adapter, model, intruders=IntruderSearch())):
        counts = {s.path: s.intruders.indices for s in report.sites if s.intruders}
        dense = {p: d.dense().detach() for p, d in adapter.deltas.items()}
        for path, change in dense.items():
            W = model.get_submodule(path).weight.detach()
            assert counts[path] == oracle(W, change, 10, 0.5)
        assert counts[where][0] == 0 and len(counts) == 21
    expected = {s.path: s.relative_norm for s in inspect_adapter(adapter, model).sites}
    assert {s.path: s.relative_norm for s in by_file.sites} == expected


def test_methods_that_depend_on_the_base_are_measured_beside_a_checkpoint(tmp_path: Path) -> None:
    model = deep_model(num_hidden_layers=2)
    folder = save_base(model, tmp_path / "base")
    for method in ("dora", "oft", "hira"):
        adapter = plait.attach(model, method, name=method, seed=0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))
        dense = {p: d.dense().detach() for p, d in adapter.deltas.items()}
        adapter.save(tmp_path / method)
        plait.detach(model)
        assert all(s.norm is None for s in inspect_adapter(tmp_path / method).sites)
        report = inspect_adapter(tmp_path / method, folder)
        for found in report.sites:
            assert found.norm == pytest.approx(float(dense[found.path].norm()), rel=1e-4)
        assert report.problems() == []


def test_a_base_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(PlaitError, match=r"holds no \.safetensors weights"):
        inspect_adapter(lora(deep_model(num_hidden_layers=1)), tmp_path / "base")
