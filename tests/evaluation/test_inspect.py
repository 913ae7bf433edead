"""An adapter's report against dense float64 linear algebra."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import plait
from plait.adapter import Adapter
from plait.errors import PlaitError
from plait.evaluation import inspect_adapter
from plait.evaluation.inspect_show import plot_report, report_table
from plait.linalg.entanglement import prime_factors
from tiny_language_model import tiny_model


def trained(model: nn.Module, rank: int = 4, **options: object) -> Adapter:
    adapter = plait.attach(model, "lora", name="a", rank=rank, **options)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    return adapter


def test_every_number_of_every_site() -> None:
    model = tiny_model()
    adapter = trained(model)
    report = inspect_adapter(adapter)
    assert len(report.sites) == 14
    for site in report.sites:
        delta = adapter.deltas[site.path]
        change = delta.dense().detach().double()
        S = torch.linalg.svdvals(change)
        shares = S / S.sum()
        entropy = -(shares[shares > 1e-9] * shares[shares > 1e-9].log()).sum()
        assert site.norm == pytest.approx(float(change.norm()), rel=1e-5)
        assert site.spectral_norm == pytest.approx(float(S[0]), rel=1e-5)
        assert site.stable_rank == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-4)
        assert site.effective_rank == pytest.approx(float(entropy.exp()), rel=1e-4)
        assert site.singular_values == pytest.approx(S[:4].tolist(), rel=1e-4)
        share = float(S[:2].square().sum() / S.square().sum())
        assert site.energy == pytest.approx({1: site.energy[1], 2: share, 4: 1.0}, rel=1e-4)
        assert site.energy[site.ranks[0.9]] >= 0.9 if site.ranks[0.9] in site.energy else True
        W = model.get_submodule(site.path).weight.double().norm()
        assert site.relative_norm == pytest.approx(float(change.norm() / W), rel=1e-5)
        assert (site.rank, site.not_finite, site.dead_components) == (4, 0, 0)
    assert {s.layer for s in report.sites} == {0, 1}
    assert report.parameters == adapter.num_parameters() and report.bytes == 4 * report.parameters
    assert report.norm == pytest.approx(sum(s.norm**2 for s in report.sites) ** 0.5)
    assert report.problems() == []


def test_relative_norms_need_a_base_and_leave_it_as_it_was() -> None:
    model = tiny_model()
    adapter = trained(model, targets=["q_proj"])
    expected = [s.relative_norm for s in inspect_adapter(adapter).sites]
    plait.detach(model)
    assert [s.relative_norm for s in inspect_adapter(adapter).sites] == [None, None]
    adapter.requires_grad_(False)
    other = tiny_model()
    assert [s.relative_norm for s in inspect_adapter(adapter, other).sites] == expected
    assert adapter.model is None and plait.adapters(other) == {}
    assert all(p.requires_grad for p in other.parameters())
    assert not any(p.requires_grad for p in adapter.parameters())
    trained(other)
    with pytest.raises(PlaitError, match="carries an adapter 'a' already"):
        inspect_adapter(adapter, other)


def test_damage_is_found() -> None:
    adapter = trained(tiny_model())
    q0, k0, v0 = (adapter.deltas[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv")
    q0.A.data[1, 2] = float("nan")
    k0.B.data.zero_()
    v0.B.data[:, 1] = 0
    report = inspect_adapter(adapter)
    sites = {s.path: s for s in report.sites}
    assert sites[q0.site.path].not_finite == 1 and sites[q0.site.path].norm is None
    assert sites[k0.site.path].is_zero and sites[v0.site.path].dead_components == 1
    problems = report.problems()
    assert len(problems) == 3
    assert "1 values are NaN or infinite" in problems[0] and "layers.0.self_attn.q" in problems[0]
    assert "zero at" in problems[1] and "1 rank components" in problems[2]
    json.loads(report.to_json())


def test_an_untrained_adapter_says_so() -> None:
    report = inspect_adapter(plait.attach(tiny_model(), "lora"))
    assert report.problems() == ["every change is zero: the adapter does nothing (was it trained?)"]


def test_table_and_plots(tmp_path: Path) -> None:
    from rich.console import Console

    report = inspect_adapter(trained(tiny_model()))
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(report_table(report))
    console.print(report_table(report, every_site=True))
    text = console.export_text()
    assert "down_proj" in text and "model.layers.1.mlp.up_proj" in text
    paths = plot_report(report, tmp_path / "plots")
    assert [p.name for p in paths] == ["norms.png", "effective_ranks.png", "spectra.png"]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in paths)


def test_entanglement_where_it_is_asked_for(tmp_path: Path) -> None:
    adapter = trained(tiny_model())
    assert not any(site.entropy for site in inspect_adapter(adapter).sites)
    report = inspect_adapter(adapter, entropy=True)
    site = report.sites[0]
    change = adapter.deltas[site.path].dense().detach().double()
    # The cut between rows and columns is an ordinary singular value decomposition.
    p = torch.linalg.svdvals(change).square()
    p = p / p.sum()
    middle = len(prime_factors(change.shape[0]))
    assert site.entropy[middle - 1] == pytest.approx(float(torch.special.entr(p).sum()), rel=1e-6)
    assert max(site.entropy[middle - 1 : middle]) <= math.log(4)
    assert tmp_path / "entanglement.png" in plot_report(report, tmp_path)


def test_a_map_of_ranks_where_they_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **_: drawn.update({Path(path).stem: self})
    )
    chosen = {"layers.1.self_attn.q_proj": {"rank": 1}, "layers.0.mlp.up_proj": {"rank": 7}}
    adapter = trained(tiny_model(), overrides=chosen, exclude=["layers.1.mlp.down_proj"])
    report = inspect_adapter(adapter)
    assert tmp_path / "ranks.png" in plot_report(report, tmp_path)
    axes, bar = drawn["ranks"].axes
    modules = [label.get_text() for label in axes.get_xticklabels()]
    written = {text.get_position(): int(text.get_text()) for text in axes.texts}
    assert written == {(modules.index(s.module), s.layer): s.rank for s in report.sites}
    assert set(written.values()) == {1, 4, 7} and len(written) == 13
    assert bar.get_ylabel() == "rank" and axes.images[0].get_clim() == (0.0, 7.0)
    assert axes.get_ylabel() == "layer"
