"""Similarity of adapters in factor space, against dense float64 matrices and scipy's angles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

import plait
from damaged import deep_model, look_trained, lora
from plait.adapter import Adapter
from plait.evaluation import inspect_adapters
from plait.evaluation.inspection import Pair


def dense(adapter: Adapter, path: str) -> np.ndarray:
    low = adapter.deltas[path].factors()
    assert low is not None
    return (low.B.detach().double() @ low.A.detach().double() * low.scale).numpy()


def pair_of(*adapters: Adapter) -> Pair:
    (pair,) = inspect_adapters(list(adapters)).pairs
    return pair


def two() -> tuple[Adapter, Adapter]:
    """Of different ranks, and not strangers to each other."""
    model = deep_model(num_hidden_layers=2)
    one, other = lora(model, "a", 0, rank=4), lora(model, "b", 1, rank=3)
    for path, delta in other.deltas.items():
        delta.B.data[:, :2] += 0.5 * one.deltas[path].B.data[:, :2]
        delta.A.data[:2] += 0.5 * one.deltas[path].A.data[:2]
    return one, other


def test_cosines_and_angles_at_every_site() -> None:
    one, other = two()
    pair = pair_of(one, other)
    assert len(pair.sites) == 14 and (pair.first, pair.second) == ("a", "b")
    for site in pair.sites:
        M, N = dense(one, site.path), dense(other, site.path)
        expected = (M * N).sum() / np.linalg.norm(M) / np.linalg.norm(N)
        assert site.cosine == pytest.approx(expected, abs=1e-9)
        for name, rows in (("column", M), ("row", M.T)):
            across = N if name == "column" else N.T
            U, V = (np.linalg.svd(X)[0][:, :r] for X, r in ((rows, 4), (across, 3)))
            angles = np.sort(np.rad2deg(subspace_angles(U, V)))
            assert getattr(site, f"{name}_angles") == pytest.approx(angles, abs=1e-4)
            overlap = np.linalg.norm(U.T @ V) ** 2 / 3
            assert getattr(site, f"{name}_overlap") == pytest.approx(overlap, abs=1e-6)


def test_everything_together() -> None:
    one, other = two()
    del other.deltas["model.layers.0.mlp.up_proj"]
    pair = pair_of(one, other)
    flat = [
        np.concatenate(
            [
                dense(a, p).ravel() * (p in a.deltas)
                if p in a.deltas
                else 0 * dense(one, p).ravel()
                for p in one.deltas
            ]
        )
        for a in (one, other)
    ]
    expected = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert pair.cosine == pytest.approx(expected, abs=1e-9) and len(pair.sites) == 13
    assert pair.column_overlap == pytest.approx(np.mean([s.column_overlap for s in pair.sites]))


def test_an_adapter_beside_itself_and_its_opposite() -> None:
    one, other = two()
    twin = lora(deep_model(num_hidden_layers=2), "twin", 0, rank=4)
    for path, delta in twin.deltas.items():  # the same spaces in another basis
        turn = torch.linalg.qr(torch.randn(4, 4))[0]
        delta.A.data = turn @ one.deltas[path].A.data
        delta.B.data = -one.deltas[path].B.data @ turn.T
    pair = pair_of(one, twin)
    assert pair.cosine == pytest.approx(-1, abs=1e-6)
    assert pair.column_overlap == pytest.approx(1, abs=1e-6)
    assert max(max(s.row_angles) for s in pair.sites) < 1e-2
    assert inspect_adapters([one, other, twin]).pairs[1].cosine == pytest.approx(-1, abs=1e-6)


def test_changes_without_factors_have_a_cosine_and_no_angles() -> None:
    model = deep_model(num_hidden_layers=2)
    one = lora(model, "a", 0)
    other = look_trained(plait.attach(model, "shira", name="b"), 1)
    plait.detach(model)
    pair = pair_of(one, other)
    for site in pair.sites:
        M, N = dense(one, site.path), other.deltas[site.path].dense().detach().double().numpy()
        expected = (M * N).sum() / np.linalg.norm(M) / np.linalg.norm(N)
        assert site.cosine == pytest.approx(expected, abs=1e-6)
        assert site.column_overlap is None and site.column_angles == []


def test_dead_directions_span_nothing() -> None:
    one, other = two()
    path = next(iter(other.deltas))
    other.deltas[path].B.data[:, 2] = 0
    site = next(s for s in pair_of(one, other).sites if s.path == path)
    assert len(site.column_angles) == 2
