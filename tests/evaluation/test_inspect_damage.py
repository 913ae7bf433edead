"""Each planted damage is found and named; sound adapters raise no alarm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import plait
from damaged import LAYERS, deep_model, look_trained, lora, save_base, site
from plait.adapter import Adapter, method_names
from plait.evaluation import inspect_adapter, inspect_adapters
from plait.evaluation.inspection import AdapterReport
from plait.training.fingerprint import fingerprint


def found(report: AdapterReport) -> dict[str, str]:
    """{check: what it says}."""
    return {f.check: f.message for f in report.findings}


def sites_of(report: AdapterReport, check: str) -> set[str]:
    return {path for f in report.findings if f.check == check for path in f.sites}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(value: float) -> None:
    adapter, where = lora(deep_model()), site(3, "k_proj")
    adapter.deltas[where].B.data[2, 1] = value
    report = inspect_adapter(adapter)
    assert list(found(report)) == ["not-finite"]
    assert found(report)["not-finite"] == f"1 values are NaN or infinite, in {where}.B (1)"
    assert sites_of(report, "not-finite") == {where} and report.not_finite == {f"{where}.B": 1}
    assert json.loads(report.to_json())["findings"][0]["sites"] == [where]


def test_a_shared_tensor_that_holds_nan() -> None:
    model = deep_model()
    adapter = look_trained(plait.attach(model, "nola", rank=2))
    name = next(iter(adapter.shared.state_dict()), None)
    if name is None:
        pytest.skip("this method stores no shared tensor")
    adapter.shared.state_dict(keep_vars=True)[name].data.flatten()[0] = float("nan")
    report = inspect_adapter(adapter)
    assert report.not_finite == {f"shared:{name}": 1} and "not-finite" in found(report)


def test_a_change_that_overflows() -> None:
    adapter = lora(deep_model())
    delta = adapter.deltas[site(1, "q_proj")]
    delta.A.data.fill_(3e38)
    delta.B.data.fill_(3e38)
    report = inspect_adapter(adapter)
    assert "overflows at model.layers.1.self_attn.q_proj" in found(report)["not-finite"]


def test_a_site_and_components_that_do_nothing() -> None:
    adapter = lora(deep_model())
    adapter.deltas[site(2, "v_proj")].B.data.zero_()
    adapter.deltas[site(5, "up_proj")].A.data[1:3] = 0
    report = inspect_adapter(adapter)
    assert found(report) == {
        "zero": f"the change is zero at {site(2, 'v_proj')}",
        "dead-ranks": f"2 rank components do nothing, at {site(5, 'up_proj')}",
    }


def test_an_untrained_adapter() -> None:
    report = inspect_adapter(plait.attach(deep_model(), "lora"))
    assert report.problems() == ["every change is zero: the adapter does nothing (was it trained?)"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("module", ["q_proj", "down_proj"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_one_site_at_twice_its_scale(seed: int, module: str, targets: Any) -> None:
    adapter = lora(deep_model(), seed=seed, targets=targets)
    assert found(inspect_adapter(adapter)) == {}
    where = site(2 + seed, module)
    adapter.deltas[where].B.data *= 2
    report = inspect_adapter(adapter)
    assert list(found(report)) == ["outlier"] and sites_of(report, "outlier") == {where}
    assert "times as large as other layers'" in found(report)["outlier"]


def test_one_site_whose_alpha_is_stated_twice_too_large(tmp_path: Path) -> None:
    adapter = lora(deep_model(), alpha=8)
    adapter.save(tmp_path / "a", format="peft")
    config = tmp_path / "a" / "adapter_config.json"
    stated = json.loads(config.read_text())
    stated["alpha_pattern"] = {site(4, "o_proj"): 2 * stated["lora_alpha"]}
    config.write_text(json.dumps(stated))
    report = inspect_adapter(tmp_path / "a")
    assert sites_of(report, "outlier") == {site(4, "o_proj")}
    assert "(its scaling is 4, elsewhere 2: is its alpha right?)" in found(report)["outlier"]


def test_a_layer_that_exploded() -> None:
    adapter = lora(deep_model())
    for path, delta in adapter.deltas.items():
        if ".6." in path:
            delta.B.data *= 8
    report = inspect_adapter(adapter)
    assert sites_of(report, "outlier") == {p for p in adapter.deltas if ".6." in p}


def siblings(**options: Any) -> list[Adapter]:
    return [lora(deep_model(), name, seed, **options) for seed, name in enumerate("abcd")]


def test_a_whole_adapter_at_twice_its_scale_beside_its_siblings() -> None:
    adapters = siblings()
    assert inspect_adapters(adapters).problems() == []
    for delta in adapters[2].deltas.values():
        delta.B.data *= 2
    assert inspect_adapter(adapters[2]).problems() == []  # alone, nothing tells
    reports = inspect_adapters(adapters).reports
    assert [list(found(r)) for r in reports] == [[], [], ["scale"], []]
    assert "times as large as its siblings'" in found(reports[2])["scale"]


def test_an_adapter_whose_alpha_is_stated_twice_too_large_beside_one_sibling() -> None:
    model = deep_model()
    adapters = [lora(model, "a", 0, alpha=8), lora(model, "b", 1, alpha=16)]
    reports = inspect_adapters(adapters).reports
    assert [list(found(r)) for r in reports] == [[], ["scale"]]
    assert "its scaling is 4, theirs 2: is its alpha right?" in found(reports[1])["scale"]


def test_a_larger_alpha_that_training_made_up_for_is_no_alarm() -> None:
    model = deep_model()
    small, large = lora(model, "a", 0, alpha=8), lora(model, "b", 1, alpha=16)
    for delta in large.deltas.values():
        delta.B.data /= 2
    assert inspect_adapters([small, large]).problems() == []


def test_the_wrong_base_by_its_fingerprint(tmp_path: Path) -> None:
    right, wrong = deep_model(), deep_model()
    with torch.no_grad():
        for parameter in wrong.parameters():
            parameter.add_(0.1)
    adapter = lora(right)
    adapter.info |= {"base": "right", "base_fingerprint": fingerprint(right)}
    folder = save_base(wrong, tmp_path / "wrong")
    for base in (wrong, folder):
        report = inspect_adapter(adapter, base)
        assert list(found(report)) == ["wrong-base"] and report.fits_base is False
        assert "another base (right)" in found(report)["wrong-base"]
    for base in (right, save_base(right, tmp_path / "right")):
        report = inspect_adapter(adapter, base)
        assert report.problems() == [] and report.fits_base is True


def test_the_wrong_base_by_its_shapes_and_places(tmp_path: Path) -> None:
    lora(deep_model()).save(tmp_path / "a", format="peft")  # which keeps no fingerprint
    wide = save_base(deep_model(intermediate_size=128), tmp_path / "wide")
    report = inspect_adapter(tmp_path / "a", wide)
    assert report.fits_base is False
    text = found(report)["wrong-base"]
    assert f"{3 * LAYERS} sites have another shape" in text and "64 x 96 in the adapter" in text
    flat = deep_model(num_hidden_layers=5)
    text = found(inspect_adapter(tmp_path / "a", flat))["wrong-base"]
    assert "has no model.layers.5.mlp.down_proj" in text and "and 18 more sites" in text
    assert inspect_adapter(tmp_path / "a", deep_model()).fits_base is None


def test_an_adapter_of_another_base_than_its_siblings() -> None:
    adapters = siblings()
    for adapter, mark in zip(adapters, ["1", "1", "2", "1"], strict=True):
        adapter.info["base_fingerprint"] = mark * 32
    reports = inspect_adapters(adapters).reports
    assert [list(found(r)) for r in reports] == [[], [], ["wrong-base"], []]


def test_a_change_that_outweighs_its_weight() -> None:
    model = deep_model()
    adapter = lora(model)
    adapter.deltas[site(3, "o_proj")].B.data *= 1e4
    report = inspect_adapter(adapter, model)
    assert sites_of(report, "outweighs") == {site(3, "o_proj")}


# -- sound adapters -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_sound_loras_raise_no_alarm(seed: int) -> None:
    model = deep_model()
    targets = ["all-linear", ["q_proj", "v_proj"], ["q_proj"]][seed % 3]
    ranks = {f"layers.{seed % LAYERS}.self_attn.q_proj": {"rank": 16}} if seed % 2 else {}
    adapter = lora(model, seed=seed, targets=targets, overrides=ranks)
    assert inspect_adapter(adapter, model).problems() == []


@pytest.mark.parametrize("initializer", ["pissa", "olora"])
def test_starts_from_the_weights_raise_no_alarm(initializer: str, tmp_path: Path) -> None:
    model = deep_model()
    with torch.no_grad():  # as in trained models, a layer of larger weights
        for path, parameter in model.named_parameters():
            if "layers.0.self_attn.k" in path:
                parameter.mul_(4)
    adapter = lora(model, initializer=initializer, rank=4, size=0.005)
    assert inspect_adapter(adapter).problems() == []
    adapter.save(tmp_path / "peft", format="peft")
    assert inspect_adapter(tmp_path / "peft").problems() == []


@pytest.mark.parametrize("method", method_names("methods"))
def test_sound_adapters_of_every_method_raise_no_alarm(method: str) -> None:
    model = deep_model(num_hidden_layers=4)
    try:
        adapter = look_trained(plait.attach(model, method, seed=1))
    except (plait.PlaitError, TypeError) as e:
        pytest.skip(f"needs more than a model: {e}")
    assert inspect_adapter(adapter).problems() == []


def test_adapters_that_peft_wrote_raise_no_alarm(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for seed, settings in enumerate([{}, {"use_rslora": True}, {"use_dora": True}]):
        config = peft.LoraConfig(r=4, target_modules="all-linear", **settings)
        wrapped = peft.get_peft_model(deep_model(), config)
        draw = torch.Generator().manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.02 * torch.randn(parameter.shape, generator=draw)
        wrapped.save_pretrained(tmp_path / str(seed))
        report = inspect_adapter(tmp_path / str(seed), deep_model())
        assert report.problems() == [] and all(s.norm for s in report.sites)
