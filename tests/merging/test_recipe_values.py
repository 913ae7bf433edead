"""How a recipe's values resolve, probed with models of ones and zeros: the weight comes out.

The expected numbers are those of mergekit 0.1.5, noted from runs of it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from recipe_models import LAYER, layer_of, loaded, names, write_model
from safetensors.torch import save_file

import plait
from plait.errors import PlaitError
from plait.merging.recipes import merge_recipe, parse_recipe
from plait.merging.recipes.values import BadValueError, parse_setting
from plait.testing import tiny_llama

FILLED = {"ones": 1.0, "zeros": 0.0, "tens": 10.0}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, value in FILLED.items():
        made = write_model(tmp_path / name, 0)
        save_file(
            {n: torch.full_like(t, value) for n, t in made.items()},
            tmp_path / name / "model.safetensors",
        )
    for name, start in (("marked", 1000), ("other", 2000)):
        made = write_model(tmp_path / name, 0)
        tensors = {}
        for n, t in made.items():
            layer = layer_of(n)
            outside = 50 if "embed" in n else 60 if "norm" in n else 70
            tensors[n] = torch.full_like(t, start + (outside if layer is None else layer))
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


def values(here: Path, text: str, out: str = "out") -> dict[str, float]:
    """The one value that each tensor of the result has."""
    (here / "r.yml").write_text(text)
    found = loaded(merge_recipe("r.yml", out).path)
    assert all(bool((t == t.flatten()[0]).all()) for t in found.values())
    return {n: float(t.flatten()[0]) for n, t in found.items()}


def weights(here: Path, weight: str) -> dict[str, float]:
    text = (
        "merge_method: linear\nparameters: {normalize: false}\nmodels:\n"
        f"  - model: ones\n    parameters:\n      weight: {weight}\n"
        "  - {model: zeros, parameters: {weight: 1}}\n"
    )
    return values(here, text)


def test_gradients_run_over_the_layers_and_start_outside_of_them(here: Path) -> None:
    found = weights(here, "[0, 1, 0.5]")
    for name, value in found.items():
        layer = layer_of(name)
        assert value == pytest.approx(0 if layer is None else [0, 2 / 3, 5 / 6, 0.5][layer])


def test_the_first_filter_that_fits_counts(here: Path) -> None:
    text = (
        "[{filter: mlp.down, value: 0.9}, {filter: mlp, value: [0, 1]},"
        " {filter: embed_tokens, value: 7}, {value: 0.25}]"
    )
    for name, value in weights(here, text).items():
        wanted = 0.25
        if "mlp.down" in name:
            wanted = 0.9
        elif "mlp" in name:
            wanted = (layer_of(name) or 0) / 3
        elif "embed" in name:
            wanted = 7.0
        assert value == pytest.approx(wanted), name
    assert set(weights_with(here, '[{filter: "*", value: 3}, {filter: mlp, value: 9}]')) == {3.0}


def weights_with(here: Path, text: str) -> list[float]:
    (here / "out").rename(here / "before")
    return list(weights(here, text).values())


def test_nearer_levels_go_first_and_a_filter_that_does_not_fit_falls_through(here: Path) -> None:
    text = """
merge_method: linear
slices:
  - sources:
    - {model: ones, layer_range: [0, 2], parameters: {weight: 0.125}}
    - {model: zeros, layer_range: [0, 2]}
    parameters: {weight: 0.25}
  - sources:
    - {model: ones, layer_range: [2, 3]}
    - {model: zeros, layer_range: [2, 3]}
    parameters: {weight: 0.25}
  - sources:
    - model: ones
      layer_range: [3, 4]
      parameters: {weight: [{filter: mlp, value: 0.75}]}
    - {model: zeros, layer_range: [3, 4]}
parameters: {normalize: false, weight: 0.5}
"""
    for name, value in values(here, text).items():
        layer = layer_of(name)
        before = 0.125 if "embed" in name else 0.5  # the last slice gives what comes after
        wanted = before if layer is None else [0.125, 0.125, 0.25, 0.5][layer]
        assert value == (0.75 if layer == 3 and "mlp" in name else wanted), name


def test_a_gradient_in_slices_runs_over_each_slice_and_one_layer_takes_its_end(here: Path) -> None:
    text = """
merge_method: linear
slices:
  - sources: [{model: ones, layer_range: [0, 3], parameters: {weight: [0, 1]}}]
  - sources: [{model: ones, layer_range: [3, 4], parameters: {weight: [0, 5, 8]}}]
  - sources: [{model: ones, layer_range: [1, 4]}]
parameters: {normalize: false, weight: [0, 8]}
"""
    found = values(here, text)
    for name, value in found.items():
        layer = layer_of(name)
        assert value == (0 if layer is None else [0, 0.5, 1, 8, 0, 4, 8][layer]), name
    assert json.loads((here / "out" / "config.json").read_text())["num_hidden_layers"] == 7


def test_truth_values_step_at_the_points(here: Path) -> None:
    text = (
        "merge_method: linear\nparameters: {weight: 1, normalize: [true, false, true]}\n"
        "models: [{model: ones}, {model: tens}]\n"
    )
    for name, value in values(here, text).items():
        layer = layer_of(name)
        assert value == (11.0 if layer == 2 else 5.5), name


def test_filters_see_the_names_of_the_sources(here: Path) -> None:
    text = """
merge_method: passthrough
slices:
  - sources:
    - model: marked
      layer_range: [2, 4]
      parameters:
        scale: [{filter: layers.1., value: 0}, {filter: layers.3., value: -1}, {value: 1}]
"""
    found = values(here, text)
    assert found["model.layers.0.mlp.up_proj.weight"] == 1002
    assert found["model.layers.1.mlp.up_proj.weight"] == -1003
    assert found["lm_head.weight"] == 1070 and len(found) == len(names(2))


def test_what_lies_outside_comes_from_the_first_slice_and_the_last(here: Path) -> None:
    text = """
merge_method: passthrough
base_model: other
slices:
  - sources: [{model: marked, layer_range: [0, 3]}]
  - sources: [{model: other, layer_range: [1, 4]}]
"""
    found = values(here, text)
    assert found["model.embed_tokens.weight"] == 1050 and found["model.norm.weight"] == 2060
    rest = next(iter(LAYER))
    inner = [found[f"model.layers.{i}.{rest}"] for i in range(6)]
    assert inner == [1000, 1001, 1002, 2001, 2002, 2003]


def test_layers_of_configs_follow(here: Path) -> None:
    config = json.loads((here / "marked" / "config.json").read_text())
    config["layer_types"] = ["full", "sliding", "full", "linear"]
    (here / "marked" / "config.json").write_text(json.dumps(config))
    text = (
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: marked, layer_range: [0, 2]}]\n"
        "  - sources: [{model: marked, layer_range: [1, 4]}]\n"
    )
    values(here, text)
    made = json.loads((here / "out" / "config.json").read_text())
    assert made["layer_types"] == ["full", "sliding", "sliding", "full", "linear"]


def test_modules_take_their_own_models(here: Path) -> None:
    """Two towers in one file; what belongs to a module has its name as a part of its own."""
    for name in ("ones", "tens", "zeros"):
        made = loaded(here / name)
        towers = {f"{part}.{n}": t for n, t in made.items() for part in ("vision", "language")}
        save_file({n: t.clone() for n, t in towers.items()}, here / name / "model.safetensors")
    text = """
merge_method: linear
modules:
  language: {models: [{model: ones, parameters: {weight: [0, 3]}}]}
  vision:
    slices:
      - sources: [{model: tens, layer_range: [1, 4]}]
    parameters: {weight: 0.5}
parameters: {normalize: false}
"""
    found = values(here, text)
    for name, value in found.items():
        layer = layer_of(name.partition(".")[2])
        language = 0 if layer is None else layer
        assert value == (language if name.startswith("language") else 5.0), name
    assert "vision.model.layers.3.mlp.up_proj.weight" not in found


def test_a_base_is_what_changes_are_taken_from_listed_or_not(here: Path) -> None:
    listed = (
        "merge_method: task_arithmetic\nbase_model: tens\nmodels:\n  - {model: tens}\n"
        "  - {model: ones, parameters: {weight: 0.5}}\n"
    )
    assert set(values(here, listed).values()) == {5.5}
    unlisted = listed.replace("  - {model: tens}\n", "")
    assert set(values(here, unlisted, "b").values()) == {5.5}
    sliced = (
        "merge_method: task_arithmetic\nbase_model: tens\nslices:\n  - sources:\n"
        "    - {model: ones, layer_range: [0, 4], parameters: {weight: 0.5}}\n"
    )
    (here / "r.yml").write_text(sliced)
    with pytest.raises(PlaitError, match="and it among each slice's sources"):
        merge_recipe("r.yml", "c")


def test_a_mean_takes_its_base_in_where_that_has_a_weight(here: Path) -> None:
    text = "merge_method: linear\nbase_model: tens\nmodels: [{model: ones}]\n"
    assert set(values(here, text + "parameters: {weight: 2}\n").values()) == {5.5}
    own = text.replace("{model: ones}", "{model: ones, parameters: {weight: 2}}")
    assert set(values(here, own, "b").values()) == {1.0}


def test_types_of_numbers(here: Path) -> None:
    for lines, dtype in (
        ("", torch.float32),
        ("dtype: bfloat16\n", torch.bfloat16),
        ("dtype: float32\nout_dtype: float16\n", torch.float16),
    ):
        text = f"merge_method: linear\n{lines}models: [{{model: ones, parameters: {{weight: 1}}}}]"
        (here / "r.yml").write_text(text)
        out = merge_recipe("r.yml", here / f"out-{dtype}").path
        assert {t.dtype for t in loaded(out).values()} == {dtype}
        facts = json.loads((out / "config.json").read_text())
        assert facts["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_a_method_of_plait_s_own_with_its_options(here: Path) -> None:
    text = (
        "method: ties\nbase_model: zeros\ndensity: 1\nparameters: {reduce: sum, scale: 0.5}\n"
        "models: [{model: ones}, {model: tens, parameters: {weight: 2}}]\n"
    )
    found = values(here, text)
    assert all(v == pytest.approx(0.5 * (1 / 2 + 2 * 10)) for v in found.values())


def test_a_model_with_a_lora_and_one_alone_on_the_base(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    model.save_pretrained("base")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = plait.attach(model, "lora", rank=2, targets=["q_proj", "up_proj"])
    for delta in adapter.deltas.values():
        torch.nn.init.normal_(delta.B)
    adapter.save("lora")
    plait.fuse(model)
    fused = {n: p.detach().clone() for n, p in model.named_parameters()}
    for i, name in enumerate(("base+lora", "lora", "{model: {path: base}, lora: {path: lora}}")):
        text = (
            "merge_method: task_arithmetic\nbase_model: base\ndtype: float32\n"
            f"models: [{{model: {name}, parameters: {{weight: 0.5}}}}]\n"
        )
        Path("r.yml").write_text(text)
        found = loaded(merge_recipe("r.yml", f"out{i}").path)
        for n, tensor in found.items():
            wanted = before[n] + 0.5 * (fused[n] - before[n])
            torch.testing.assert_close(tensor, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("value", "at", "words"),
    [
        ([], (), "empty list"),
        ([1, "x"], (), "numbers, or truth values, or names"),
        ([1, [2]], (1,), "no number"),
        ([{"value": 1}, 2], (1,), "not both"),
        ([{"filter": "a"}], (0,), "needs a value"),
        ([{"filter": 3, "value": 1}], (0,), "part of a tensor's name"),
        ([{"value": [1, float("inf")]}], (0, "value", 1), "finite"),
        ({"a": 1}, (), "no number"),
    ],
)
def test_values_that_are_none(value: object, at: tuple, words: str) -> None:
    with pytest.raises(BadValueError, match=words) as caught:
        parse_setting(value)
    assert caught.value.at == at


def test_words_that_are_numbers_are_numbers() -> None:
    recipe = parse_recipe("merge_method: nearswap\nmodels: [{model: a}]\nparameters: {t: 1e-5}\n")
    assert recipe.parameters["t"].at("x", 0.5) == 1e-5
    assert parse_setting(["1e-5", 3]).at("x", 0.5) == pytest.approx(1.500005)
