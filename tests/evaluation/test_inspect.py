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
from plait.evaluation import inspect_adapter, inspect_adapters, write_inspection
from plait.evaluation.inspection.plots import adapter_figures
from plait.evaluation.inspection.tables import report_table
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
    trained(other)  # another adapter of that name, which the base keeps
    assert [s.relative_norm for s in inspect_adapter(adapter, other).sites] == expected
    assert list(plait.adapters(other)) == ["a"]


def test_table_and_plots(tmp_path: Path) -> None:
    from rich.console import Console

    report = inspect_adapter(trained(tiny_model()))
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(report_table(report))
    console.print(report_table(report, every_site=True))
    text = console.export_text()
    assert "down_proj" in text and "model.layers.1.mlp.up_proj" in text
    assert set(adapter_figures(report)) == {"norms", "effective_ranks", "spectra"}


def test_entanglement_where_it_is_asked_for() -> None:
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
    left, right = site.entropy[: middle - 1], site.entropy[middle:]
    expected = min(max(left), max(right)) - site.entropy[middle - 1]
    assert site.valley == pytest.approx(expected) and site.valley > 0
    assert "entanglement" in adapter_figures(report)


def test_a_map_of_ranks_where_they_differ() -> None:
    chosen = {"layers.1.self_attn.q_proj": {"rank": 1}, "layers.0.mlp.up_proj": {"rank": 7}}
    adapter = trained(tiny_model(), overrides=chosen, exclude=["layers.1.mlp.down_proj"])
    report = inspect_adapter(adapter)
    axes, bar = adapter_figures(report)["ranks"].axes
    modules = [label.get_text() for label in axes.get_xticklabels()]
    written = {text.get_position(): int(text.get_text()) for text in axes.texts}
    assert written == {(modules.index(s.module), s.layer): s.rank for s in report.sites}
    assert set(written.values()) == {1, 4, 7} and len(written) == 13
    assert bar.get_ylabel() == "rank" and axes.images[0].get_clim() == (0.0, 7.0)
    assert axes.get_ylabel() == "layer"


def test_savings_are_what_the_command_saves(tmp_path: Path) -> None:
    adapter = trained(tiny_model(), rank=8)
    for delta in adapter.deltas.values():
        delta.B.data[:, 3:] *= 0.01
    plait.detach(adapter.model)
    adapter.save(tmp_path / "a")
    found = inspect_adapter(tmp_path / "a").savings
    assert found is not None and found.energy == 0.99
    words = found.command.split()
    assert words[:2] == ["plait", "compress"] and words[2] == str(tmp_path / "a")
    small = plait.squeeze(plait.read_adapter(tmp_path / "a"), energy=0.99)
    assert {p: d.rank for p, d in small.deltas.items()} == found.ranks
    assert found.bytes == 4 * small.num_parameters() < 4 * adapter.num_parameters()
    flat = trained(tiny_model(), rank=1)
    assert inspect_adapter(flat).savings is None


def test_sizes_on_disk_are_the_adapters_own_files(tmp_path: Path) -> None:
    adapter = trained(tiny_model())
    plait.detach(adapter.model)
    adapter.save(tmp_path / "own")
    adapter.save(tmp_path / "peft", format="peft")
    size = {f.name: f.stat().st_size for k in ("own", "peft") for f in (tmp_path / k).iterdir()}
    (tmp_path / "own" / "optimizer.pt").write_bytes(b"x" * 1000)
    report = inspect_adapter(tmp_path / "own")
    assert report.file_bytes == size["plait.json"] + size["adapter.safetensors"]
    report = inspect_adapter(tmp_path / "peft" / "adapter_model.safetensors")
    assert report.file_bytes == size["adapter_config.json"] + size["adapter_model.safetensors"]


def test_a_pickle_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    adapter = trained(tiny_model())
    plait.detach(adapter.model)
    adapter.save(tmp_path / "a", format="peft")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(plait.PlaitError, match="damaged, or not a safetensors file"):
        inspect_adapter(tmp_path / "a")
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(plait.PlaitError, match="a pickle file, which can run code"):
        inspect_adapter(tmp_path / "a")


def test_packed_experts_and_changes_without_factors() -> None:
    model = tiny_model()
    adapter = plait.attach(model, "ia3", name="ia3")
    for parameter in adapter.parameters():
        parameter.data = parameter.data * 1.1
    report = inspect_adapter(adapter)
    for site in report.sites:
        dense = adapter.deltas[site.path].dense().detach().double()
        assert site.norm == pytest.approx(float(dense.norm()), rel=1e-5)


def test_files_of_one_adapter_and_of_several(tmp_path: Path) -> None:
    one = trained(tiny_model())
    written = write_inspection(inspect_adapters([one]), tmp_path / "one")
    names = {p.name for p in written}
    assert names == {
        "report.html",
        "report.json",
        "norms.png",
        "effective_ranks.png",
        "spectra.png",
    }
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in written if p.suffix == ".png")
    two = trained(tiny_model())
    two.name = "../../<b>evil</b>"
    found = inspect_adapters([one, two])
    written = write_inspection(found, tmp_path / "two")
    assert {p.parent for p in written} == {tmp_path / "two"}
    assert "b-evil-b-norms.png" in {p.name for p in written}
    html = (tmp_path / "two" / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in html and "&lt;b&gt;evil" in html
    facts = json.loads((tmp_path / "two" / "report.json").read_text())
    assert [a["name"] for a in facts["adapters"]] == ["a", two.name]
    assert facts["pairs"][0]["cosine"] == pytest.approx(1.0)
