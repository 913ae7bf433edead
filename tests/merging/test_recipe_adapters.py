"""Recipes whose models are adapters: an adapter comes out, as `plait.merge` makes it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import plait
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.heatmap import heat_map, place_of
from plait.merging.recipes import merge_recipe
from plait.merging.report import adapter_facts
from plait.testing import tiny_llama


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    for i, name in enumerate(("a", "b", "c")):
        targets = ["q_proj", "up_proj"] if name != "c" else ["up_proj"]
        adapter = plait.attach(model, "lora", name=name, rank=2 + i, targets=targets)
        g = torch.Generator().manual_seed(i)
        for p in adapter.parameters():
            p.data = torch.randn(p.shape, generator=g) * 0.3
        adapter.save(tmp_path / name)
    return tmp_path


def changes(path: str | Path) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {k: d.dense().double() for k, d in plait.read_adapter(path).deltas.items()}


def run(text: str, out: str = "out", **options: object):
    Path("r.yml").write_text(text)
    return merge_recipe("r.yml", out, **options)


def test_mergekit_s_file_with_adapters_for_models(here: Path) -> None:
    done = run(
        "merge_method: linear\nmodels:\n"
        "  - {model: a, parameters: {weight: [1, 0.5]}}\n"
        "  - {model: b, parameters: {weight: [{filter: q_proj, value: 0}, {value: 3}]}}\n"
    )
    a, b, found = changes("a"), changes("b"), changes("out")
    assert done.adapter is not None and done.inputs == ("a", "b") and set(found) == set(a)
    for path, change in found.items():
        w = [0.5 if ".1." in path else 1.0, 0.0 if "q_proj" in path else 3.0]
        wanted = (w[0] * a[path] + w[1] * b[path]) / sum(w)
        torch.testing.assert_close(change, wanted, atol=1e-5, rtol=1e-5)


def test_weights_that_add_up_to_nothing_are_named(here: Path) -> None:
    with pytest.raises(PlaitError, match=r"add up to 0 at 'model.layers.1.self_attn.q_proj"):
        run(
            "merge_method: linear\nmodels:\n"
            "  - {model: a, parameters: {weight: [1, 0]}}\n"
            "  - {model: b, parameters: {weight: 0}}\n"
        )
    assert not Path("out").exists()


@pytest.mark.parametrize("space", ["aligned", "delta"])
def test_space_rank_and_density_are_keys_of_the_recipe(here: Path, space: str) -> None:
    run(
        f"method: ties\nspace: {space}\nrank: 2\ndensity: 0.4\nparameters: {{weight: 0.5}}\n"
        "models: [{model: a}, {model: b}, {model: c}]\n"
    )
    options = {"space": space, "rank": 2, "density": 0.4}
    wanted = plait.merge(["a", "b", "c"], "ties", [0.5] * 3, **options)
    found = changes("out")
    for path, delta in wanted.deltas.items():
        assert plait.read_adapter("out").deltas[path].rank == 2
        torch.testing.assert_close(found[path], delta.dense().double(), atol=1e-6, rtol=1e-5)


def test_ties_of_mergekit_on_a_base_that_need_not_be_there(here: Path) -> None:
    run(
        "merge_method: ties\nbase_model: someone/base-7b\nmodels:\n"
        "  - {model: a, parameters: {weight: 1, density: 0.5}}\n"
        "  - {model: b, parameters: {weight: 0.5, density: 0.25}}\n"
    )
    wanted = plait.merge(["a", "b"], "ties", [1.0, 0.5], density=[0.5, 0.25])
    for path, change in changes("out").items():
        torch.testing.assert_close(change, wanted.deltas[path].dense().double())


def test_slerp_between_two_adapters(here: Path) -> None:
    run(
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: a}]\n"
        "parameters: {t: 0.25}\n"
    )
    a, b = changes("a"), changes("b")
    for path, change in changes("out").items():
        x, y = a[path], b[path]
        angle = math.acos(float((x * y).sum() / (x.norm() * y.norm())))
        wanted = (math.sin(0.75 * angle) * x + math.sin(0.25 * angle) * y) / math.sin(angle)
        torch.testing.assert_close(change, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "merge_method: ties\nbase_model: x\nmodels: [{model: a}, {model: b}]\n"
            "parameters: {weight: 1, density: [0.5, 1]}\n",
            "one value of each parameter but weight",
        ),
        (
            "merge_method: ties\nbase_model: x\nmodels: [{model: a, parameters: {density: 0}}]\n"
            "parameters: {weight: 1}\n",
            "takes no part; leave it out",
        ),
        ("merge_method: passthrough\nmodels: [{model: a}]\n", "nothing to merge of adapters"),
        ("method: linear\nspace: aligned\nmodels: [{model: a}]\n", "works in factors or delta"),
        ("method: linear\nrank: 0\nmodels: [{model: a}]\n", "line 2 .*greater than or equal to 1"),
        ("method: linear\ndtype: float16\nmodels: [{model: a}]\n", "is no model but an adapter"),
        ("method: fisher\nmodels: [{model: a}, {model: b}]\n", "needs statistics"),
    ],
)
def test_what_adapters_cannot_do(here: Path, text: str, words: str) -> None:
    with pytest.raises(PlaitError, match=words):
        run(text)
    assert not Path("out").exists()


def test_facts_of_adapters_are_those_of_dense_matrices(here: Path) -> None:
    adapters = [plait.read_adapter(n) for n in ("a", "b", "c")]
    merged = plait.merge(adapters, weights=[1.0, -0.5, 0.3], rank=3)
    facts = adapter_facts(adapters, merged)
    for path, found in facts.items():
        dense = [changes(n).get(path) for n in ("a", "b", "c")]
        zero = torch.zeros_like(changes("a")[path])
        dense = torch.stack([zero if d is None else d for d in dense])
        norms = dense.flatten(1).norm(dim=1)
        assert found["norms"] == pytest.approx(norms.tolist(), rel=1e-5)
        cosine = float((dense[0] * dense[1]).sum() / (norms[0] * norms[1]))
        assert found["cosines"][0][1] == pytest.approx(cosine, abs=1e-4)
        conflicts = (dense.amax(0) > 0) & (dense.amin(0) < 0)
        assert found["conflicts"] == pytest.approx(float(conflicts.double().mean()), abs=1e-4)
        whole = dense[0] - 0.5 * dense[1] + 0.3 * dense[2]
        S = torch.linalg.svdvals(whole)
        share = float(S[3:].square().sum() / S.square().sum())
        assert found["dropped"] == pytest.approx(share, abs=1e-5)
        assert found["norm"] == pytest.approx(float(S[:3].norm()), rel=1e-5)


def test_a_picture_of_any_facts(tmp_path: Path) -> None:
    facts = {
        "model.embed_tokens.weight": {"norms": [1.0, 2.0], "cosines": [[1, 0.1], [0.1, 1]]},
        "model.layers.0.mlp.up_proj.weight": {"norms": [0.0, 0.0], "conflicts": 0.25},
        "model.layers.11.mlp.up_proj.bias": {"norms": [3.0, 1.0], "dropped": 0.5},
    }
    assert [place_of(name) for name in facts] == [
        (None, "embed_tokens"),
        (0, "up_proj"),
        (11, "up_proj.bias"),
    ]
    for given in (facts, {}, {"head": {}}):
        file = heat_map(given, tmp_path / "map.png")
        assert file.read_bytes().startswith(b"\x89PNG")


def test_a_low_rank_of_nothing_has_facts_too(here: Path) -> None:
    merged = plait.merge(["a", "b"], weights=[0.0, 0.0])
    facts = adapter_facts([plait.read_adapter(n) for n in ("a", "b")], merged)
    assert all(f["norm"] == 0 and f["dropped"] == 0 for f in facts.values())
    assert json.loads(json.dumps(facts)) == facts
    assert isinstance(next(iter(merged.deltas.values())).factors(), LowRank)
