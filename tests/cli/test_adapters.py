"""inspect, convert, merge: from files to files."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import plait
from tiny_language_model import tiny_model


def test_inspect_shows_a_table_and_everything_as_json(run, adapters, base: Path) -> None:
    code, out, err = run("inspect", adapters["sql"])
    assert code == 0 and err == ""
    assert out.startswith("sql (lora): 14 sites") and "no problems found" in out
    assert "\x1b" not in out and "│" not in out  # no colours and no boxes in a pipe
    facts = json.loads(run("inspect", adapters["sql"], "--json", "--base", base)[1])
    assert len(facts["sites"]) == 14 and facts["problems"] == []
    assert all(s["relative_norm"] > 0 for s in facts["sites"])
    assert "model.layers.1.mlp.up_proj" in run("inspect", adapters["sql"], "--sites")[1]


def test_inspect_writes_a_report(run, adapters, tmp_path: Path) -> None:
    code, _, err = run("inspect", adapters["chat"], "--out", tmp_path / "out")
    assert code == 0 and err.count("wrote ") == 5
    assert (tmp_path / "out" / "norms.png").stat().st_size > 1000
    assert json.loads((tmp_path / "out" / "report.json").read_text())["adapters"]
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")


def test_inspect_compares_several(run, adapters, base: Path) -> None:
    words = ["inspect", adapters["sql"], adapters["chat"], "--base", base, "--intruders"]
    code, out, err = run(*words)
    assert code == 0 and err == ""
    assert "sql, chat" in out and "rows overlap" in out
    facts = json.loads(run(*words, "--json")[1])
    assert len(facts["adapters"]) == 2 and len(facts["pairs"][0]["sites"]) == 4
    assert facts["intruder_search"] == {"top": 10, "threshold": 0.5}
    code, _, err = run("inspect", adapters["sql"], "--intruders")
    assert code == 2 and "name it with --base" in err


def test_inspect_can_fail_on_damage(run, tmp_path: Path) -> None:
    plait.attach(tiny_model(), "lora", name="new").save(tmp_path / "new")
    code, out, _ = run("inspect", tmp_path / "new")
    assert code == 0 and "problem: every change is zero" in out
    code, _, err = run("inspect", tmp_path / "new", "--check")
    assert code == 2 and "does nothing" in err
    assert run("inspect", tmp_path / "new", "--check", "--allow", "zero")[0] == 0
    code, _, err = run("inspect", tmp_path / "new", "--check", "--allow", "zeros")
    assert code == 2 and "did you mean 'zero'?" in err


def test_merge_is_the_weighted_sum(run, adapters, tmp_path: Path) -> None:
    out = tmp_path / "both"
    code, text, err = run(
        "merge", adapters["sql"], adapters["chat"], "--weights", "1,-0.5", "-o", out
    )
    assert code == 0, err
    assert "nothing was dropped" in text and "weights 1, -0.5" in text and f"wrote {out}" in text
    merged = plait.read_adapter(out)
    sql, chat = (plait.read_adapter(adapters[n]) for n in ("sql", "chat"))
    assert merged.name == "both"
    for path, delta in merged.deltas.items():
        expected = sql.deltas[path].dense().double()
        if path in chat.deltas:
            expected = expected - 0.5 * chat.deltas[path].dense().double()
        torch.testing.assert_close(delta.dense().double(), expected, rtol=1e-4, atol=1e-6)


def test_merge_cut_to_a_rank_says_what_it_drops(run, adapters, tmp_path: Path) -> None:
    words = ["merge", adapters["sql"], adapters["chat"], "--rank", "2", "-o", tmp_path / "r2"]
    code, text, _ = run(*words)
    assert code == 0 and "rank 2" in text and "dropped energy: mean" in text


def test_merge_of_attached_adapters_when_a_base_is_given(
    run, adapters, base: Path, tmp_path: Path
) -> None:
    words = ["merge", adapters["sql"], adapters["sql"], "--base", base, "-o", tmp_path / "same"]
    code, _, err = run(*words)
    assert code == 0, err
    merged, sql = plait.read_adapter(tmp_path / "same"), plait.read_adapter(adapters["sql"])
    for path, delta in merged.deltas.items():
        torch.testing.assert_close(delta.dense(), sql.deltas[path].dense(), rtol=1e-4, atol=1e-6)


def test_convert_cuts_to_a_rank_and_keeps_the_rest(run, adapters, tmp_path: Path) -> None:
    code, text, err = run(
        "convert", adapters["sql"], tmp_path / "small", "--to", "plait", "--rank", 1
    )
    assert code == 0, err
    assert "dropped energy" in text
    small = plait.read_adapter(tmp_path / "small")
    assert {d.rank for d in small.deltas.values()} == {1}
    code, text, _ = run("convert", adapters["sql"], tmp_path / "copy", "--to", "plait")
    assert code == 0 and "dropped" not in text
    code, _, err = run("convert", adapters["sql"], tmp_path / "x", "--to", "peftt")
    assert (code == 2 and "did you mean 'peft'?" in err) or "unknown format 'peftt'" in err


def test_merge_by_entries_and_into_a_checkpoint(run, adapters, base: Path, tmp_path: Path) -> None:
    inputs = [adapters["sql"], adapters["chat"]]
    out = tmp_path / "ties"
    code, text, err = run("merge", *inputs, "--method", "ties", "--density", "0.5", "-o", out)
    assert code == 0, err
    assert "ties in aligned" in text
    assert plait.read_adapter(out).info["merge"]["options"]["density"] == 0.5
    code, text, err = run("merge", *inputs, "--into", base, "-o", tmp_path / "model")
    assert code == 0, err
    assert (tmp_path / "model" / "merge.json").is_file()
    assert list((tmp_path / "model").glob("*.safetensors"))
    code, _, err = run("merge", *inputs, "--density", "0.5", "-o", tmp_path / "none")
    assert code != 0 and "unknown option 'density'" in err
