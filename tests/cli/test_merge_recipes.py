"""`plait merge` with recipes, whole models, statistics and reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import plait
from tiny_language_model import save_tiny_base


@pytest.fixture(scope="module")
def models(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tunes")
    return {"base": base, **{n: save_tiny_base(folder / n, seed=i) for i, n in enumerate("ab", 1)}}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_recipe_of_models_with_a_report(run, models, tmp_path: Path) -> None:
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(
        "merge_method: task_arithmetic\nbase_model: base\n"
        "models:\n  - {model: a, parameters: {weight: 0.5}}\n  - {model: b}\n"
        "parameters: {weight: 0.25, int8_mask: true}\n"
    )
    words = ["merge", recipe, "-o", tmp_path / "out", "--report", tmp_path / "report"]
    pairs = [word for name, path in models.items() for word in ("--model", f"{name}={path}")]
    code, text, err = run(*words, *pairs)
    assert code == 0, err
    assert "merged 3 inputs" in text and "note: int8_mask does nothing here." in err
    found, parts = tensors(tmp_path / "out"), [tensors(models[n]) for n in ("base", "a", "b")]
    for name, tensor in found.items():
        x, y, z = (part[name].double() for part in parts)
        torch.testing.assert_close(tensor.double(), x + 0.5 * (y - x) + 0.25 * (z - x))
    facts = json.loads((tmp_path / "report" / "merge.json").read_text())
    assert facts["method"] == "task_arithmetic" and len(facts["sites"]) == len(found)
    assert (tmp_path / "report" / "merge.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "recipe.yaml").read_text() == recipe.read_text()
    code, _, err = run(*words, *pairs)
    assert code == 2 and "exists" in err


def test_a_recipe_of_adapters_gives_an_adapter(run, adapters, tmp_path: Path) -> None:
    recipe = tmp_path / "mix.yml"
    recipe.write_text(
        f"method: linear\nrank: 3\nmodels:\n"
        f"  - model: {adapters['sql']}\n    parameters: {{weight: [1, 0]}}\n"
        f"  - model: {adapters['chat']}\n    parameters: {{weight: -0.5}}\n"
    )
    out, report = tmp_path / "both", tmp_path / "report"
    code, text, err = run("merge", recipe, "-o", out, "--report", report, "--to", "peft")
    assert code == 0, err
    assert "rank 3" in text and "dropped energy" in text and (out / "adapter_config.json").is_file()
    sql, chat = (plait.read_adapter(adapters[n]) for n in ("sql", "chat"))
    merged, facts = plait.read_adapter(out), json.loads((report / "merge.json").read_text())
    for path, delta in merged.deltas.items():
        whole = sql.deltas[path].dense().double() * (1.0 if ".0." in path else 0.0)
        norms = [float(sql.deltas[path].dense().detach().norm()), 0.0]
        if path in chat.deltas:
            whole = whole - 0.5 * chat.deltas[path].dense().double()
            norms[1] = float(chat.deltas[path].dense().detach().norm())
        U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
        torch.testing.assert_close(
            delta.dense().double(), (U[:, :3] * S[:3]) @ Vh[:3], atol=1e-5, rtol=1e-4
        )
        site = facts["sites"][path]
        assert site["norms"] == pytest.approx(norms, rel=1e-4)
        square = float(S.square().sum())
        share = float(S[3:].square().sum()) / square if square else 0.0
        assert site["dropped"] == pytest.approx(share, abs=1e-5)


def test_models_are_averaged_and_methods_in_turn_reach_checkpoints(run, models, tmp_path) -> None:
    code, _, err = run("merge", models["a"], models["b"], "-o", tmp_path / "mean")
    assert code == 0, err
    a, b = tensors(models["a"]), tensors(models["b"])
    for name, tensor in tensors(tmp_path / "mean").items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)
    words = ["merge", models["a"], models["b"], "--into", models["base"], "--method", "opcm"]
    code, text, err = run(*words, "-o", tmp_path / "opcm", "--shard-size", "0.00002")
    assert code == 0, err
    assert "(opcm)" in text and len(list((tmp_path / "opcm").glob("*.safetensors"))) > 2


def test_statistics_go_along(run, models, adapters, tmp_path: Path) -> None:
    adapter = plait.read_adapter(adapters["sql"])
    files, grams = [], []
    for i in range(2):
        made = {}
        for path, delta in adapter.deltas.items():
            x = torch.randn(50, delta.site.shape[-1], generator=torch.Generator().manual_seed(i))
            made[path] = x.mT @ x / 50
        grams.append(made)
        files.append(tmp_path / f"{i}.safetensors")
        save_file(made, files[-1])
    pairs = [word for file in files for word in ("--statistics", file)]
    start = ["merge", adapters["sql"], adapters["sql"], "--method", "regmean"]
    code, _, err = run(*start, *pairs, "-o", tmp_path / "same")
    assert code == 0, err
    same = plait.read_adapter(tmp_path / "same")
    for path, delta in same.deltas.items():
        torch.testing.assert_close(
            delta.dense(), adapter.deltas[path].dense(), atol=1e-4, rtol=1e-4
        )
    words = ["merge", models["a"], models["b"], "--into", models["base"], "--method", "regmean"]
    code, _, err = run(*words, *pairs, "-o", tmp_path / "model", "-s", "shrink=1", "-s", "ridge=0")
    assert code == 0, err
    base, a, b = (tensors(models[n]) for n in ("base", "a", "b"))
    path = "model.layers.1.mlp.up_proj"
    G, H = (g[path].double() for g in grams)
    x, y, z = (m[f"{path}.weight"].double() for m in (base, a, b))
    wanted = x + ((y - x) @ G + (z - x) @ H) @ torch.linalg.inv(G + H)
    found = tensors(tmp_path / "model")
    torch.testing.assert_close(found[f"{path}.weight"].double(), wanted, atol=1e-4, rtol=1e-4)
    norm = "model.norm.weight"  # of which there are no statistics
    torch.testing.assert_close(found[norm], base[norm] + (a[norm] + b[norm] - 2 * base[norm]) / 2)


def test_what_does_not_go_together(run, models, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("merge_method: linaer\nmodels: [{model: a}]\n")
    out = ["-o", tmp_path / "out"]
    for words, message in (
        ([recipe], "line 1 (merge_method): unknown merge_method 'linaer'; did you mean 'linear'?"),
        ([recipe, models["a"]], "merged alone"),
        ([recipe, "--method", "ties"], "leave out the options"),
        ([models["a"], "--model", "a=b"], "name a recipe"),
        ([models["a"], models["b"], "--rank", 4], "cuts adapters"),
        ([models["a"], models["b"], "--shard-size", 0], "gigabytes"),
        ([recipe, "--model", "a"], "NAME=FOLDER"),
    ):
        code, _, err = run("merge", *words, *out)
        assert code == 2 and message in err, err
        assert not (tmp_path / "out").exists()


def test_stacked_layers_and_a_union_of_tokens_load_and_answer(run, models, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more = AutoTokenizer.from_pretrained(models["b"])
    more.add_tokens(["<tool>", "<end>"])
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(models["b"])
    model.resize_token_embeddings(len(more))
    model.save_pretrained(other)
    more.save_pretrained(other)
    recipe = tmp_path / "stack.yaml"
    recipe.write_text(
        f"merge_method: passthrough\nslices:\n"
        f"  - sources: [{{model: {models['a']}, layer_range: [0, 2]}}]\n"
        f"  - sources: [{{model: {other}, layer_range: [1, 2]}}]\n"
        "tokenizer: {source: union}\nchat_template: chatml\ndtype: bfloat16\n"
    )
    code, _, err = run("merge", recipe, "-o", tmp_path / "out")
    assert code == 0, err
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert made.dtype == torch.bfloat16 and len(made.model.layers) == 3
    ids = words("hello<tool>", return_tensors="pt")
    assert ids["input_ids"][0, -1] == words.convert_tokens_to_ids("<tool>") == 258
    assert made(**ids).logits.shape[-1] == len(words) == 260
    parts = {n: AutoModelForCausalLM.from_pretrained(models[n]) for n in "ab"}
    for layer, source, number in ((0, "a", 0), (1, "a", 1), (2, "b", 1)):
        wanted = parts[source].model.layers[number].mlp.up_proj.weight.bfloat16()
        assert torch.equal(made.model.layers[layer].mlp.up_proj.weight, wanted)
