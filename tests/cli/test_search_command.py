"""`plait search` on a tiny model, from files to files, with kills and resumption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import plait
from plait.evaluation import evaluate
from plait.merging.search import read_coefficients
from tiny_language_model import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def tasks(adapters, tmp_path_factory) -> dict[str, Path]:
    """For each adapter, what the model with that adapter says: it does best at its own rows."""
    folder, files = tmp_path_factory.mktemp("tasks"), {}
    tokenizer = byte_tokenizer()
    for name, path in adapters.items():
        model = tiny_model()
        plait.load(model, path)
        rows = []
        for i in range(6):
            prompt = f"{name} {i}:"
            ids = tokenizer(prompt, return_tensors="pt")
            out = model.generate(**ids, max_new_tokens=6, do_sample=False)
            text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            rows.append({"prompt": prompt, "completion": text or "x"})
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.fixture
def words(base: Path, adapters, tmp_path: Path):
    """The command up to its method and data."""
    start = ["search", adapters["sql"], adapters["chat"], "--base", base, "--no-template"]
    return [*start, "-o", tmp_path / "out"]


def loss(active, file: Path, adapters) -> float:
    model = tiny_model()
    for name, path in adapters.items():
        plait.load(model, path, name, activate=False)
    plait.activate(model, active)
    found = evaluate(model, byte_tokenizer(), file, "loss", template=False)
    return found.results[0].scores["loss"].value


def test_lorahub_from_files_to_an_adapter_that_does_better(
    run, words, tasks, adapters, base, tmp_path
) -> None:
    options = ["-s", "optimizer=nelder-mead", "-s", "l1=0"]
    more = ["-m", "lorahub", "--data", tasks["sql"], "--budget", 15, *options]
    code, out, err = run(*words, *more)
    assert code == 0, err
    assert "lorahub: 15 evaluations (15 of them new)" in out
    folder = tmp_path / "out"
    facts = json.loads((folder / "search.json").read_text())
    assert facts["evaluations"] == 15 and facts["value"] < facts["values"][0]
    weights = read_coefficients(folder / "coefficients.json")
    assert loss(weights, tasks["sql"], adapters) == pytest.approx(facts["value"], rel=1e-5)
    assert loss({}, tasks["sql"], adapters) == pytest.approx(facts["values"][0], rel=1e-5)
    merged = plait.read_adapter(folder / "adapter")
    assert merged.name == "out"
    code, out, err = run(
        "merge", *adapters.values(), "--weights", folder / "coefficients.json", "-o", tmp_path / "m"
    )
    assert code == 0 and "weights by site, by site" in out, err
    again = plait.read_adapter(tmp_path / "m")
    for path, delta in merged.deltas.items():
        torch.testing.assert_close(again.deltas[path].dense(), delta.dense())
    turned = ["merge", *reversed(adapters.values()), "--weights", folder / "coefficients.json"]
    assert run(*turned, "-o", tmp_path / "t")[0] == 0  # the file's names say whose weights
    for path, delta in plait.read_adapter(tmp_path / "t").deltas.items():
        torch.testing.assert_close(delta.dense(), merged.deltas[path].dense())


def test_an_interrupted_search_loses_the_running_trial_only(
    run, words, tasks, tmp_path, monkeypatch
) -> None:
    from plait.evaluation.measure import Measure

    asked, value = [], Measure.value

    def counted(self, model) -> float:
        asked.append(1)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return value(self, model)

    monkeypatch.setattr(Measure, "value", counted)
    more = ["-m", "lorahub", "--data", tasks["sql"], "--budget", 12, "-s", "optimizer=random"]
    code, _, err = run(*words, *more)
    assert code == 130 and "the same command goes on from there" in err
    trials = tmp_path / "out" / "trials.jsonl"
    assert trials.read_text().count('"point"') == 5
    code, out, err = run(*words, *more)
    assert code == 0 and "12 evaluations (7 of them new)" in out, err
    assert len(asked) == 6 + 7
    code, out, _ = run(*words, *more)
    assert code == 0 and "(0 of them new)" in out and len(asked) == 13
    longer = [*more[:-3], 14, *more[-2:]]
    assert "14 evaluations (2 of them new)" in run(*words, *longer)[1]
    code, _, err = run(*words, *more, "-s", "bound=1")
    assert code == 2 and "belongs to another search" in err and "options" in err
    code, _, err = run(*words, *more, "--limit", 3)
    assert code == 2 and "data" in err
    code, out, _ = run(*words, *more, "--limit", 3, "--restart")
    assert code == 0 and "(12 of them new)" in out


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_end(words, tasks, tmp_path) -> None:
    more = ["-m", "lorahub", "--data", tasks["sql"], "--budget", 40, "-s", "optimizer=random"]

    def started(out: Path):
        call = [sys.executable, "-m", "plait.cli.main", *map(str, [*words, *more])]
        call[call.index("-o") + 1] = str(out)
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(call, env=env, stdout=subprocess.PIPE, text=True)

    whole = started(tmp_path / "whole")
    assert whole.wait(240) == 0
    killed, trials = started(tmp_path / "cut"), tmp_path / "cut" / "trials.jsonl"
    until = time.monotonic() + 200
    while time.monotonic() < until and killed.poll() is None:
        if trials.is_file() and trials.read_text().count('"point"') >= 5:
            break
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    assert 5 <= trials.read_text().count('"point"') < 40
    again = started(tmp_path / "cut")
    assert again.wait(240) == 0
    for name in ("trials.jsonl", "coefficients.json"):
        one, other = ((tmp_path / o / name).read_text() for o in ("whole", "cut"))
        assert one == other


@pytest.mark.parametrize("form", ["plain", "bayesian", "nested"])
def test_map_writes_a_front_and_its_picture(run, words, tasks, tmp_path, form: str) -> None:
    data = [w for name, file in tasks.items() for w in ("--data", f"{name}={file}")]
    more = ["-m", "map", *data, "-s", f"form={form}", "--prefer", "1,0", "--limit", 3]
    code, out, err = run(*words, *more)
    assert code == 0, err
    assert "front of" in out and "held-out" in out and "chosen: sql" in out
    folder = tmp_path / "out"
    assert (folder / "front.png").read_bytes()[:4] == b"\x89PNG"
    front = json.loads((folder / "search.json").read_text())["front"]
    assert front["objectives"] == ["sql", "chat"] and len(front["measured"]) == 12
    first = read_coefficients(folder / "coefficients.json")
    other = [*more[: more.index("1,0")], "0,1", *more[more.index("1,0") + 1 :]]
    code, out, err = run(*words, *other)
    if form == "nested":  # an inner preference is part of the search
        assert code == 2 and "preference" in err
        return
    assert code == 0 and "(0 of them new)" in out, err
    assert read_coefficients(folder / "coefficients.json") != first


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("adamerging", ["--budget", 3]),
        ("expert-merging", ["--budget", 8, "-s", "chunks=2"]),
        ("fw-merging", ["--budget", 3]),
        ("fw-merging", ["--budget", 3, "-s", "lowers=entropy"]),
        ("lora-soups", ["--budget", 3]),
        ("m2n2", ["--budget", 5]),
        ("unconstrained-merging", ["--budget", 5, "-s", "optimizer=random"]),
        ("octo-planner", ["--metric", "exact_match", "--max-new-tokens", 3]),
    ],
)
def test_every_other_method_runs(run, words, tasks, tmp_path, method, options) -> None:
    data = [w for name, file in tasks.items() for w in ("--data", f"{name}={file}")]
    code, out, err = run(*words, "-m", method, *data, *options, "--limit", 2, "--rank", 4)
    assert code == 0, err
    facts = json.loads((tmp_path / "out" / "search.json").read_text())
    wanted = int(options[1]) if options[0] == "--budget" else 8
    assert facts["evaluations"] == wanted and f"{method}: {wanted} evaluations" in out
    merged = plait.read_adapter(tmp_path / "out" / "adapter")
    assert max(d.rank for d in merged.deltas.values()) <= 4
    model = tiny_model()
    for name, path in zip(facts["adapters"], facts["adapters"].values(), strict=True):
        plait.load(model, path, name, activate=False)
    plait.activate(model, read_coefficients(tmp_path / "out" / "coefficients.json"))
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_search_over_another_merge_leaves_no_weights_of_a_sum(
    run, words, tasks, tmp_path
) -> None:
    options = ["-s", "inner=ties", "-s", "optimizer=random", "--budget", 3, "--limit", 2]
    code, out, err = run(*words, "-m", "unconstrained-merging", "--data", tasks["sql"], *options)
    assert code == 0, err
    folder = tmp_path / "out"
    assert not (folder / "coefficients.json").exists() and "coefficients.json" not in out
    assert json.loads((folder / "search.json").read_text())["merge"]["method"] == "layered"
    assert plait.read_adapter(folder / "adapter").deltas


def test_a_recipe_stands_for_its_held_out_rows(run, words, tasks, tmp_path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: nowhere.jsonl\neval_data: {tasks['sql']}\n")
    more = ["-m", "octo-planner", "-s", "lambdas=[0.5,1.0]", "--data", f"t={recipe}", "--limit", 2]
    code, _, err = run(*words, *more)
    assert code == 0, err
    facts = json.loads((tmp_path / "out" / "search.json").read_text())
    assert facts["data"] == {"t": 2}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-m", "lorahubb"], "did you mean 'lorahub'"),
        (["-m", "ties"], "merges without data: run `plait merge --method ties`"),
        (["-m", "lorahub", "-s", "evaluation=3"], "did you mean 'evaluations'"),
        (["-m", "lorahub", "--prefer", "1,1"], "unknown option 'preference'"),
        (["-m", "lora-soups", "--metric", "choice"], "follows gradients"),
        (["-m", "adamerging", "--metric", "choice"], "wants inputs of each task"),
        (["-m", "expert-merging"], "--data NAME=FILE for sql, chat; there are sql"),
        (["-m", "map", "--budget", "4"], "need at least 6 evaluations"),
        (["-m", "lorahub", "--budget", "1"], "too small"),
        (["-m", "m2n2", "--metric", "choice"], "has no choices"),
    ],
)
def test_errors_are_one_line(run, words, tasks, more, message) -> None:
    code, _, err = run(*words, "--data", tasks["sql"], *more)
    assert code == 2 and message in err and err.count("\n") == 1


def test_missing_packages_and_files_are_named(run, words, tasks, monkeypatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    absent = lambda name, *a: None if name in ("cma", "matplotlib") else find(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    code, _, err = run(*words, "-m", "lorahub", "--data", tasks["sql"])
    assert code == 2 and "needs cma; run `pip install 'plait[search]'`" in err
    data = [w for name, file in tasks.items() for w in ("--data", f"{name}={file}")]
    code, _, err = run(*words, "-m", "map", *data, "--limit", 1)
    assert code == 0 and "no front.png" in err and "plait[plots]" in err
    code, _, err = run(*words, "-m", "map", "--data", "none.jsonl")
    assert code == 2 and "none.jsonl: there is no such file" in err
    code, _, err = run(*words, "-m", "map", "--data", tasks["sql"], "--data", tasks["sql"])
    assert code == 2 and "two tasks are called 'sql'" in err


def test_merge_methods_and_searches_stand_in_one_list(run) -> None:
    rows = {r["name"]: r for r in json.loads(run("methods", "--merge", "--json")[1])}
    assert rows["ties"]["searches with"] == ""
    assert rows["adamerging"]["searches with"] == "inputs of each task, without labels"
    code, out, _ = run("methods", "expert-merging", "--merge")
    assert code == 0 and "chunks=1" in out and "plait search out/sql out/chat" in out
    code, _, err = run("merge", "a", "b", "--method", "adamerging", "-o", "out")
    assert code == 2 and "run `plait search --method adamerging`" in err
    code, _, err = run("merge", "a", "b", "-s", "rank=3", "-o", "out")
    assert code == 2 and "rank is the merge's own" in err
