"""What can go wrong under a merge: one line, or a run that goes on; inputs are never touched."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipe_models import loaded, write_model
from safetensors.torch import save_file
from shard_writing import stopped_after, watched

from plait.errors import FormatError, PlaitError
from plait.merging import engine, merge_checkpoints, shards
from plait.merging.recipes import merge_recipe

TIES = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 1, density: 0.5}}
  - {model: b, parameters: {weight: [0, 1], density: [0.2, 1]}}
"""
SMALL = 1500
"""Bytes a shard, of some ten."""


def digest(folder: Path) -> str:
    mark = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            mark.update(str(file).encode() + file.read_bytes())
    return mark.hexdigest()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A recipe, a base and two fine-tunes; at the end they are what they were."""
    monkeypatch.chdir(tmp_path)
    base = write_model(tmp_path / "base", 0)
    for i, name in enumerate("ab", 1):
        write_model(tmp_path / name, i, of=base)
    (tmp_path / "recipe.yml").write_text(TIES)
    yield tmp_path


@pytest.fixture
def untouched(here: Path):
    before = {name: digest(here / name) for name in ("base", "a", "b")}
    yield
    assert before == {name: digest(here / name) for name in ("base", "a", "b")}


def script(here: Path, body: str) -> str:
    return (
        "import os, signal, resource\n"
        "from plait.merging import engine\nfrom plait.merging.recipes import merge_recipe\n"
        f"os.chdir({str(here)!r})\n{body}\n"
        f"merge_recipe('recipe.yml', 'out', shard_size={SMALL})\n"
    )


KILL = (
    "real, done = engine._write_one, []\n"
    "def one(job, i):\n    real(job, i)\n    done.append(i)\n"
    "    if len(done) == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
    "engine._write_one = one"
)
KILL_INSIDE = (
    "from plait.merging import shards\nreal, seen = engine._make, []\n"
    "def make(*given):\n    seen.append(1)\n"
    "    if len(seen) == 9: os.kill(os.getpid(), signal.SIGKILL)\n    return real(*given)\n"
    "engine._make = make"
)


@pytest.mark.slow
@pytest.mark.parametrize("body", [KILL, KILL_INSIDE], ids=["between", "inside"])
def test_kill_minus_nine_half_way_and_again(here: Path, untouched, monkeypatch, body: str) -> None:
    found = subprocess.run([sys.executable, "-c", script(here, body)], capture_output=True)
    assert found.returncode == -9, found.stderr
    assert not (here / "out").exists()
    ready = {f.name for f in (here / ".out.merging").glob("model-*.safetensors")}
    assert ready
    again: list[str] = []
    real = engine._write_one
    monkeypatch.setattr(
        engine, "_write_one", lambda job, i: (again.append(job.names[i]), real(job, i))
    )
    merge_recipe("recipe.yml", "out", shard_size=SMALL)
    assert again and not ready & set(again)
    merge_recipe("recipe.yml", "whole")
    one, two = loaded(here / "out"), loaded(here / "whole")
    assert set(one) == set(two) and all(torch.equal(one[n], two[n]) for n in one)
    assert not list(here.glob(".*merging")) and not list((here / "out").glob(".*"))


@pytest.mark.slow
def test_a_limit_on_file_sizes_is_one_line_and_the_run_goes_on(here: Path, untouched) -> None:
    body = (
        "from plait.errors import PlaitError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))\nimport sys\n"
        "sys.excepthook = lambda kind, error, trace: sys.exit(f'{kind.__name__}: {error}')"
    )
    found = subprocess.run([sys.executable, "-c", script(here, body)], capture_output=True)
    text = found.stderr.decode()
    assert found.returncode == 1 and "could not be written: File too large" in text
    assert not (here / "out").exists() and not list((here / ".out.merging").glob("*.part"))
    merge_recipe("recipe.yml", "out", shard_size=SMALL)
    assert len(loaded(here / "out")) == len(loaded(here / "base"))


def test_a_disk_that_fills_up_half_way(here: Path, untouched, monkeypatch) -> None:
    real, calls = shards.os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(FormatError, match="No space left"):
        merge_recipe("recipe.yml", "out", shard_size=SMALL)
    staging = here / ".out.merging"
    assert not (here / "out").exists() and not list(staging.glob("*.part"))
    assert len(list(staging.glob("model-*.safetensors"))) == 2
    merge_recipe("recipe.yml", "out", shard_size=SMALL)
    assert not staging.exists()


def test_a_changed_recipe_or_input_starts_anew(here: Path, monkeypatch) -> None:
    stopped_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        merge_recipe("recipe.yml", "out", shard_size=SMALL)
    again = watched(monkeypatch)
    (here / "recipe.yml").write_text(TIES.replace("weight: 1,", "weight: 2,"))
    merge_recipe("recipe.yml", "out", shard_size=SMALL)
    assert 0 in again and 1 in again
    merge_recipe("recipe.yml", "whole")
    one, two = loaded(here / "out"), loaded(here / "whole")
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.slow
def test_processes_and_seeds(here: Path) -> None:
    (here / "recipe.yml").write_text(TIES.replace("ties", "dare_ties"))
    for out, options in (
        ("one", {"seed": 4}),
        ("two", {"seed": 4, "shard_size": 4000, "processes": 2}),
        ("other", {"seed": 5}),
    ):
        merge_recipe("recipe.yml", out, **options)
    one, two, other = (loaded(here / n) for n in ("one", "two", "other"))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


def damaged(here: Path, kind: str) -> str:
    """Makes model `c` with a fault; the words that the error must have."""
    base = loaded(here / "base")
    file = here / "c" / "model.safetensors"
    if kind == "vocabulary":
        write_model(here / "c", 3, words=23)
        return r"embed_tokens.weight' is \[23, 8\].*vocabularies differ: add tokenizer_source"
    write_model(here / "c", 3, of=base, **({"hidden_size": 9} if kind == "base" else {}))
    made = loaded(here / "c")
    if kind == "base":
        return "c has hidden_size 9, base has 8"
    if kind == "missing":
        del made["model.layers.2.mlp.up_proj.weight"]
        words = "c lacks 'model.layers.2.mlp.up_proj.weight'"
    elif kind == "surplus":
        made["model.layers.1.mlp.extra.weight"] = torch.ones(3)
        words = "c has 'model.layers.1.mlp.extra.weight' besides"
    elif kind == "shape":
        made["model.layers.1.mlp.up_proj.weight"] = torch.ones(11, 8)
        words = r"'model.layers.1.mlp.up_proj.weight' is \[11, 8\] in c and \[12, 8\]"
    elif kind in ("nan", "inf"):
        made["model.layers.3.self_attn.q_proj.weight"][2, 3] = float(kind)
        words = "'model.layers.3.self_attn.q_proj.weight' has NaN or infinity"
    elif kind == "depth":
        made = {n: t for n, t in made.items() if ".3." not in n}
        words = "c has 3 layers, and base 4"
    else:
        content = file.read_bytes()
        if kind == "cut":
            file.write_bytes(content[:-100])
        elif kind == "header":
            file.write_bytes(struct.pack("<Q", 2**60) + content[8:])
        else:
            file.unlink()
            (here / "c" / "pytorch_model.bin").write_bytes(b"\x80")
        return {"pickle": "pickle, which can run code"}.get(kind, "damaged, or not a safetensors")
    save_file(made, file)
    return words


KINDS = [
    "vocabulary",
    "base",
    "missing",
    "surplus",
    "shape",
    "nan",
    "inf",
    "depth",
    "cut",
    "header",
    "pickle",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["recipe", "function"])
def test_inputs_that_do_not_fit_are_named(here: Path, untouched, kind: str, how: str) -> None:
    words = damaged(here, kind)
    before = digest(here / "c")
    (here / "recipe.yml").write_text(TIES.replace("{model: b", "{model: c"))
    if how == "function":  # knows no layers, and of recipes only from elsewhere
        words = {"depth": "c lacks", "vocabulary": "vocabularies differ"}.get(kind, words)
    with pytest.raises(PlaitError, match=words):
        if how == "recipe":
            merge_recipe("recipe.yml", "out")
        else:
            merge_checkpoints(["a", "c"], "out", "ties", base="base")
    assert not (here / "out").exists() and digest(here / "c") == before


def test_no_numbers_but_the_vocabulary_s_own_count_as_damage(here: Path) -> None:
    """Integer buffers are copied, not merged."""
    for name in ("base", "a", "b"):
        made = loaded(here / name)
        made["model.positions"] = torch.arange(5)
        save_file(made, here / name / "model.safetensors")
    merge_recipe("recipe.yml", "out")
    assert torch.equal(loaded(here / "out")["model.positions"], torch.arange(5))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merge_method: ties\n", "line 1: a recipe needs models, slices or modules"),
        ("merge_method: ties\nmodel: [a]\n", r"line 2 \(model\): unknown key 'model'; did you"),
        ("merge_method: teis\nmodels: [{model: a}]\n", "unknown merge_method 'teis'; did you mean"),
        ("merge_method: opcm\nmodels: [{model: a}]\n", "write method: instead"),
        ("method: tis\nmodels: [{model: a}]\n", r"line 1 \(method\): unknown merge method 'tis'"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1: not readable as plain YAML"),
        ("merge_method: !!python/name:os.system\n", "not readable as plain YAML"),
        ("merge_method: ties\nmerge_method: ties\n", "line 2: 'merge_method' stands here twice"),
        ("merge_method: [ties\n", "not readable as plain YAML"),
        ("- ties\n", "`key: value` are wanted"),
        ("merge_method: ties\nmodels:\n  - {model: nowhere}\n", "'nowhere': there is no such"),
        ("merge_method: ties\nmodels: [{model: a}]\n", "ties needs a base_model"),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\n",
            "t is missing at 'model.embed_tokens.weight'",
        ),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: base}]\n",
            "slerp merges 2 models, not 3",
        ),
        (
            "merge_method: linear\nmodels:\n  - model: a\n    parameters:\n      wieght: 1\n",
            r"line 5 \(models\[0\].parameters.wieght\): unknown parameter 'wieght' in linear; did",
        ),
        (
            "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: [1, [2]]}\n",
            r"line 4 .*weight\[1\]\): \[2\] is no number",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: heavy}}]\n",
            "weight is a number, not 'heavy'",
        ),
        (
            "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
            "  - {model: b, parameters: {weight: -1}}\n",
            "the weights add up to 0 at 'model.embed_tokens.weight'",
        ),
        (
            "merge_method: passthrough\nslices:\n  - sources:\n"
            "    - {model: a, layer_range: [2, 9]}\n",
            r"layer_range \[2, 9\] of a: it has 4 layers",
        ),
        (
            "merge_method: passthrough\nslices:\n  - sources:\n"
            "    - {model: a, layer_range: [2, 2]}\n",
            r"line 4 .*layer_range \[2, 2\] holds no layer",
        ),
        (
            "merge_method: linear\nslices:\n  - sources: [{model: a}]\n    residual_weight: 1\n",
            "line 4 .*residual_weight is not supported",
        ),
        (
            "merge_method: linear\ndtype: bf16\nmodels: [{model: a}]\n",
            r"line 2 \(dtype\): .*'bfloat16'",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]\n",
            "nan is not a finite number",
        ),
        (
            "merge_method: linear\nmodules:\n  visoin_tower: {models: [{model: a}]}\n",
            "unknown module 'visoin_tower' in the model's tensors; known:",
        ),
    ],
)
def test_recipes_that_do_not_hold_up(here: Path, untouched, text: str, words: str) -> None:
    (here / "recipe.yml").write_text(text)
    with pytest.raises(PlaitError, match=words) as caught:
        merge_recipe("recipe.yml", "out")
    assert "\n" not in str(caught.value) and not list(here.glob("*out*"))


def test_aliases_of_aliases_do_not_explode(here: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8)]
    (here / "recipe.yml").write_text("\n".join(lines))
    with pytest.raises(PlaitError, match="more than 100000 values"):
        merge_recipe("recipe.yml", "out")


def test_the_report_says_what_was_done(here: Path) -> None:
    merge_recipe("recipe.yml", "out", seed=7)
    facts = json.loads((here / "out" / "merge.json").read_text())
    assert facts["method"] == "ties" and facts["base"] == "base" and facts["seed"] == 7
    assert facts["recipe"] == TIES and (here / "out" / "recipe.yaml").read_text() == TIES
    base, a = loaded(here / "base"), loaded(here / "a")
    name = "model.layers.1.mlp.up_proj.weight"
    norm = float((a[name] - base[name]).double().norm())
    assert facts["sites"][name]["norms"][0] == pytest.approx(norm, rel=1e-4)


def test_names_of_the_hub(here: Path, monkeypatch) -> None:
    import huggingface_hub

    asked = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        if name == "someone/none":
            raise OSError("offline.\nMany more lines.")
        return str(here / "b")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (here / "recipe.yml").write_text(TIES.replace("{model: b", "{model: someone/model@v1"))
    merge_recipe("recipe.yml", "out")
    (here / "recipe.yml").write_text(TIES)
    merge_recipe("recipe.yml", "plain")
    one, two = loaded(here / "out"), loaded(here / "plain")
    assert all(torch.equal(one[n], two[n]) for n in one) and asked == [("someone/model", "v1")]
    (here / "recipe.yml").write_text(TIES.replace("{model: b", "{model: someone/none"))
    with pytest.raises(PlaitError, match=r"not to be had from the hub \(offline\); say .*--model"):
        merge_recipe("recipe.yml", "none")


def test_the_index_says_which_files_count(here: Path) -> None:
    """Repositories hold further copies of the weights, and downloads lose shards."""
    made = loaded(here / "b")
    half = len(made) // 2
    parts = {"m-1.safetensors": list(made)[:half], "m-2.safetensors": list(made)[half:]}
    for file, kept in parts.items():
        save_file({n: made[n] for n in kept}, here / "b" / file)
    where = {n: file for file, kept in parts.items() for n in kept}
    merge_recipe("recipe.yml", "plain")
    save_file({"layers.0.wq": torch.ones(2)}, here / "b" / "consolidated.safetensors")
    merge_recipe("recipe.yml", "whole")  # model.safetensors alone counts
    index = here / "b" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    (here / "b" / "model.safetensors").unlink()
    merge_recipe("recipe.yml", "parts")
    one, two, three = (loaded(here / n) for n in ("plain", "whole", "parts"))
    assert all(torch.equal(one[n], two[n]) and torch.equal(one[n], three[n]) for n in one)
    (here / "b" / "m-2.safetensors").unlink()
    with pytest.raises(FormatError, match=r"b/m-2.safetensors is missing, though model.safe"):
        merge_recipe("recipe.yml", "none")
    index.write_text('{"weight_map": [1]}')
    with pytest.raises(FormatError, match="damaged, or not an index"):
        merge_recipe("recipe.yml", "none")
