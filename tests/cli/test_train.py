"""`plait train`: from a recipe to an adapter that other commands use without naming the base."""

from __future__ import annotations

import json
from pathlib import Path

import plait


def recipe(folder: Path, base: Path, data: Path) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(f"base: {base}\ndata: {data}\noutput: {folder / 'out'}\nrank: 2\nsteps: 3\n")
    return file


def test_train_then_eval_and_merge(run, base: Path, data: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, base, data)
    code, _, err = run("train", file, "batch_size=2", "max_length=64", "export=[]", "parity=false")
    assert code == 0, err
    trained = tmp_path / "out" / "adapter"
    adapter = plait.read_adapter(trained)
    assert {d.rank for d in adapter.deltas.values()} == {2}
    words = ["eval", "--adapter", trained, "--data", data, "--metric", "loss", "--json"]
    code, out, err = run(*words)
    assert code == 0, err
    assert [r["label"] for r in json.loads(out)["results"]] == ["base", str(trained)]
    code, _, err = run("merge", trained, trained, "-o", tmp_path / "twice")
    assert code == 0, err
    info = plait.read_adapter(tmp_path / "twice").info
    assert (
        info["base"] == str(base) and info["base_fingerprint"] == adapter.info["base_fingerprint"]
    )


def test_a_dry_run_reads_no_data_and_writes_nothing(run, base: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, base, tmp_path / "missing.jsonl")
    code, out, err = run("train", file, "rank=4", "--dry-run")
    assert code == 0, err
    assert "14 sites" in out and f"{4 * plait_rank_one(base):,}" in out
    assert not (tmp_path / "out").exists()


def plait_rank_one(base: Path) -> int:
    """What rank 1 trains on all linears: in + out of each."""
    from plait.cli.skeleton import skeleton

    return sum(s.in_features + s.out_features for s in plait.find_sites(skeleton(str(base))))


def test_keys_are_checked_before_anything_is_loaded(run, base: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, base, tmp_path / "missing.jsonl")
    code, _, err = run("train", file, "mehtod=dora")
    assert code == 2 and "did you mean 'method'?" in err
    code, _, err = run("train", tmp_path / "no.yaml")
    assert code == 2 and "there is no such file" in err
