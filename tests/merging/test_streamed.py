"""Full checkpoints merged tensor by tensor: exact, resumable, and careful with its inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipe_models import loaded
from safetensors.torch import save_file
from shard_writing import stopped_after, watched
from torch import Tensor

import plait
from plait.errors import FormatError, PlaitError
from plait.merging import engine, merge_checkpoints, shards
from plait.testing import tiny_llama


def state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "embed.weight": torch.randn(20, 8),
        "layers.0.up.weight": torch.randn(12, 8),
        "layers.0.up.bias": torch.randn(12),
        "layers.0.down.weight": torch.randn(8, 12),
        "positions": torch.arange(6),
    }


def write(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir(parents=True)
    names = list(tensors)
    for i, part in enumerate((names[:2], names[2:]), 1):
        save_file({n: tensors[n] for n in part}, folder / f"model-0000{i}-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", **config}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    made = {name: write(tmp_path / name, state(i)) for i, name in enumerate(("base", "a", "b"))}
    made["out"] = tmp_path / "out"
    return made


def test_the_weighted_sum_of_changes_is_added_to_the_base(models) -> None:
    inputs = [models["a"], models["b"]]
    out = merge_checkpoints(inputs, models["out"], weights=[0.7, -0.2], base=models["base"])
    base, a, b = (state(i) for i in range(3))
    for name, tensor in loaded(out).items():
        if tensor.is_floating_point():
            x, y, z = (s[name].double() for s in (base, a, b))
            wanted = x + 0.7 * (y - x) - 0.2 * (z - x)
            torch.testing.assert_close(tensor.double(), wanted, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(tensor, base[name])
    facts = json.loads((out / "merge.json").read_text())
    assert facts["weights"] == [0.7, -0.2] and facts["method"] == "linear"
    one = facts["sites"]["layers.0.up.weight"]
    change = (a["layers.0.up.weight"] - base["layers.0.up.weight"]).double()
    assert one["norms"][0] == pytest.approx(float(change.norm()), rel=1e-4)
    assert one["cosines"][0][0] == 1 and 0 <= one["conflicts"] <= 1
    assert (out / "tokenizer.json").is_file() and not list(out.glob(".*"))


def test_without_a_base_the_models_themselves_are_merged(models) -> None:
    out = merge_checkpoints([models["a"], models["b"]], models["out"], "slerp", [0.75, 0.25])
    x, y = (state(i)["embed.weight"].double() for i in (1, 2))
    angle = torch.arccos((x * y).sum() / (x.norm() * y.norm()))
    parts = (0.75 * angle).sin() / angle.sin() / x.norm(), (0.25 * angle).sin() / angle.sin()
    wanted = (0.75 * x.norm() + 0.25 * y.norm()) * (parts[0] * x + parts[1] / y.norm() * y)
    torch.testing.assert_close(loaded(out)["embed.weight"].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "options"), [("ties", {"density": 0.4}), ("dare", {})])
def test_shards_and_processes_do_not_show(models, tmp_path, method: str, options: dict) -> None:
    inputs, given = [models["a"], models["b"]], {"base": models["base"], "seed": 4, **options}
    one = merge_checkpoints(inputs, models["out"], method, **given)
    two = merge_checkpoints(inputs, tmp_path / "two", method, shard_size=500, processes=2, **given)
    assert len(list(two.glob("*.safetensors"))) > 2
    index = json.loads((two / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(state(0))
    for name, tensor in loaded(one).items():
        assert torch.equal(loaded(two)[name], tensor), name


def test_adapters_and_models_merge_together(tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    other = tiny_llama()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01)
    other.save_pretrained(tmp_path / "other")
    adapter = plait.attach(base, "lora", rank=2, seed=0, targets=["q_proj", "up_proj"])
    for delta in adapter.deltas.values():
        torch.nn.init.normal_(delta.B)
    adapter.save(tmp_path / "adapter")
    plait.fuse(base)
    inputs = [tmp_path / "adapter", tmp_path / "other"]
    out = merge_checkpoints(inputs, tmp_path / "out", weights=[1.0, 0.0], base=tmp_path / "base")
    for name, tensor in loaded(out).items():
        torch.testing.assert_close(
            tensor, dict(base.named_parameters())[name], atol=1e-5, rtol=1e-5
        )
    type(base).from_pretrained(out)  # transformers reads it
    with pytest.raises(PlaitError, match="give base="):
        merge_checkpoints(inputs, tmp_path / "none")


def test_a_killed_run_goes_on_with_the_shards_that_are_missing(models, monkeypatch) -> None:
    inputs, given = [models["a"], models["b"]], {"base": models["base"], "shard_size": 500}
    written = stopped_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(inputs, models["out"], **given)
    assert not models["out"].exists()
    again = watched(monkeypatch)
    merge_checkpoints(inputs, models["out"], **given)
    assert again and not set(again) & set(written)
    assert not list(models["out"].parent.glob(".*merging"))


def test_another_merge_does_not_take_up_shards_that_are_not_its_own(models, monkeypatch) -> None:
    inputs, write_one = [models["a"], models["b"]], engine._write_one

    def die(job, index):
        write_one(job, index)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_write_one", die)
    given = {"base": models["base"], "shard_size": 500}
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(inputs, models["out"], weights=[1.0, 0.0], **given)
    monkeypatch.setattr(engine, "_write_one", write_one)
    out = merge_checkpoints(inputs, models["out"], weights=[0.0, 1.0], **given)
    torch.testing.assert_close(loaded(out)["embed.weight"], state(2)["embed.weight"])


def test_a_full_disk_is_one_line_and_leaves_nothing_half_done(models, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(FormatError, match="No space left"):
        merge_checkpoints([models["a"]], models["out"], base=models["base"])
    assert not models["out"].exists()
    staging = next(models["out"].parent.glob(".*merging"))
    assert not list(staging.glob("*.part")) and not list(staging.glob("*.safetensors"))


def test_inputs_that_do_not_belong_together_are_named(models, tmp_path: Path) -> None:
    def tries(message: str, tensors: dict[str, Tensor], **config: object) -> None:
        folder = write(tmp_path / message[:4].strip(), tensors, **config)
        before = {f: f.read_bytes() for f in folder.iterdir()}
        with pytest.raises(PlaitError, match=message):
            merge_checkpoints([models["a"], folder], models["out"], base=models["base"])
        assert before == {f: f.read_bytes() for f in folder.iterdir()}
        assert not models["out"].exists()

    short = {n: t for n, t in state(3).items() if n != "layers.0.up.bias"}
    tries(r"lacks 'layers.0.up.bias'", short)
    tries("vocabularies differ", {**state(3), "embed.weight": torch.randn(21, 8)})
    tries("has 'more' besides", {**state(3), "more": torch.ones(2)})
    tries("NaN or infinity", {**state(3), "layers.0.up.bias": torch.full((12,), float("nan"))})
    write(tmp_path / "other", state(3), hidden_size=9)
    write(tmp_path / "wide", state(3), hidden_size=8)
    with pytest.raises(PlaitError, match="hidden_size"):
        merge_checkpoints([tmp_path / "other"], models["out"], base=tmp_path / "wide")
    with pytest.raises(PlaitError, match="needs statistics"):
        merge_checkpoints([models["a"]], models["out"], "regmean", base=models["base"])
    with pytest.raises(PlaitError, match="exists"):
        merge_checkpoints([models["a"]], models["b"], base=models["base"])
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match="pickle"):
        merge_checkpoints([models["a"]], models["out"], base=tmp_path / "pickled")
    with pytest.raises(FormatError, match="holds no"):
        merge_checkpoints([models["a"]], models["out"], base=tmp_path / "nowhere")


@pytest.mark.slow
def test_kill_minus_nine_half_way_and_again(models, tmp_path: Path) -> None:
    script = (
        "import sys, os, signal\nfrom plait.merging import engine, merge_checkpoints\n"
        "real, done = engine._write_one, []\n"
        "def one(job, i):\n    real(job, i)\n    done.append(i)\n"
        "    if len(done) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "engine._write_one = one\n"
        f"merge_checkpoints([{str(models['a'])!r}], {str(models['out'])!r}, "
        f"base={str(models['base'])!r}, shard_size=500)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert not models["out"].exists()
    out = merge_checkpoints([models["a"]], models["out"], base=models["base"], shard_size=500)
    torch.testing.assert_close(loaded(out)["embed.weight"], state(1)["embed.weight"])
