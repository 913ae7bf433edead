"""`plait methods` and `plait show`: tables that agree with the registry and with real models."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import plait
from plait.adapter import PairOptions
from plait.cli.methods_table import option_rows
from plait.cli.show import group_paths, parse_layers, parse_targets
from plait.errors import PlaitError
from tiny_language_model import tiny_model


def test_the_table_lists_every_method(run) -> None:
    code, out, _ = run("methods", "--json")
    rows = json.loads(out)
    assert code == 0 and {r["name"] for r in rows} == set(plait.method_names())
    code, out, _ = run("methods", "--axis", "param")
    assert code == 0 and "lora " in out and "\x1b" not in out
    assert all("parameterisation" in line for line in out.splitlines()[1:])


def test_trainable_counts_are_those_of_real_adapters(run, base: Path) -> None:
    rows = json.loads(run("methods", "--json", "--axis", "param", "--base", base)[1])
    counted = {r["name"]: r["trainable"] for r in rows}
    adapter = plait.attach(tiny_model(), "lora")
    assert counted["lora"] == adapter.num_parameters()


def test_one_method_in_full(run) -> None:
    code, out, _ = run("methods", "lora")
    assert code == 0
    assert "dW = scaling * B A" in out and "rank=8  (int)" in out and "Rank r of dW." in out
    assert "Example:  plait train recipe.yaml method=lora" in out
    facts = json.loads(run("methods", "lora", "--json")[1])
    assert [o["name"] for o in facts["options"]][:2] == ["rank", "alpha"]


@pytest.mark.parametrize("name", plait.method_names())
def test_every_method_describes_itself(run, name: str) -> None:
    code, out, _ = run("methods", name)
    assert code == 0 and "Example:" in out and len(out.splitlines()) > 5


def test_a_method_that_does_not_load_hides_no_other(run, monkeypatch) -> None:
    monkeypatch.setattr("plait.cli.methods_table.method_names", lambda: ["broken", "lora"])
    code, out, err = run("methods", "--json")
    assert code == 0 and [r["name"] for r in json.loads(out)] == ["lora"]
    assert err.startswith("method 'broken' cannot be loaded: unknown method")


def test_merge_methods(run) -> None:
    assert "linear" in run("methods", "--merge")[1]
    assert "Exact, by concatenating factors" in run("methods", "linear", "--merge")[1]
    assert "Another name of dare, with elect=true" in run("methods", "--merge")[1]
    assert "elect=true  (bool)" in run("methods", "dare_ties", "--merge")[1]


def test_option_meanings_come_from_the_strings_under_the_fields() -> None:
    @dataclass(frozen=True)
    class Own(PairOptions):
        rank: int = 4
        power: tuple[float, ...] = (1.0, 2.0)
        """How strongly
        it acts."""
        bare: bool = True

    rows = {r["name"]: r for r in option_rows(Own)}
    assert rows["power"]["meaning"] == "How strongly it acts."
    assert rows["power"]["default"] == (1.0, 2.0)
    assert rows["rank"]["default"] == 4 and rows["rank"]["meaning"] == "Rank r of dW."
    assert rows["bare"]["meaning"] == ""


def test_methods_do_not_import_transformers() -> None:
    code = (
        "import sys; from plait.cli.main import main; main(['methods']);"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_show_tells_what_attach_would_touch(run, base: Path) -> None:
    facts = json.loads(
        run("show", base, "--targets", "q_proj,down_proj", "-s", "rank=3", "--json")[1]
    )
    adapter = plait.attach(tiny_model(), "lora", rank=3, targets=["q_proj", "down_proj"])
    assert [s["path"] for s in facts["sites"]] == list(adapter.deltas)
    assert facts["trainable"] == adapter.num_parameters()
    code, out, _ = run("show", base, "--targets", ".*mlp.*proj", "--layers", "1")
    assert code == 0 and "model.layers.1.mlp.up_proj" in out and "3 sites" in out
    out = run("show", base)[1]
    assert "model.layers.{0-1}.self_attn.q_proj" in out and "14 sites" in out
    assert run("show", base, "--all")[1].count("_proj") == 14


def test_show_names_the_nearest_target(run, base: Path) -> None:
    code, _, err = run("show", base, "--targets", "q_prj")
    assert code == 2 and "did you mean 'q_proj'?" in err
    code, _, err = run("show", base, "-s", "rnak=3")
    assert code == 2 and "did you mean 'rank'?" in err
    code, _, err = run("show", base, "-s", "rank")
    assert code == 2 and "key=value" in err


def test_grouping_and_parsing() -> None:
    paths = ["a.0.x", "a.1.x", "a.2.x", "a.5.x", "b.7", "c"]
    assert list(group_paths(paths)) == ["a.{0-2,5}.x", "b.7", "c"]
    assert parse_layers("0,4,20-22") == [0, 4, 20, 21, 22]
    with pytest.raises(PlaitError, match="'x' is no number"):
        parse_layers("1,x")
    assert parse_targets("q_proj, v_proj") == ["q_proj", "v_proj"]
    assert parse_targets(".*(q|v)_proj") == ".*(q|v)_proj"
    assert parse_targets("all-linear") == "all-linear"
