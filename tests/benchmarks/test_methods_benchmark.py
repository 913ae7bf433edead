"""The methods benchmark: its contenders do what they are said to, and its figures are right."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

import plait
import tiny

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import method_contenders
import method_table
from models import random_batch

import methods as benchmark


@pytest.fixture(scope="module")
def base():
    return tiny.llama()


def lora_count(base) -> int:
    sites = plait.find_sites(base, "all-linear")
    return sum(8 * (s.in_features + s.out_features) for s in sites)


@pytest.mark.parametrize("name", ["dora", "adalora", "mos", "paca"])
def test_the_budget_s_option_gives_lora_s_parameters(base, name: str) -> None:
    target = lora_count(base)
    options = method_contenders.budget_options(base, plait.get_method(name), target)
    model = tiny.llama()
    adapter = plait.attach(model, name, seed=0, **options)
    assert adapter.num_parameters() == pytest.approx(target, rel=0.08)


def test_defaults_at_the_budget_and_methods_without_a_knob(base) -> None:
    find = lambda name, n: method_contenders.budget_options(base, plait.get_method(name), n)  # noqa: E731
    assert find("lora", lora_count(base)) == {}
    assert find("ia3", lora_count(base)) is None and find("lora-plus", lora_count(base)) is None
    assert benchmark._lora_parameters(base) == lora_count(base)


@pytest.mark.parametrize("name", ["dora", "adalora", "lora-fa", "pissa", "ia3"])
def test_both_sides_train_the_same_number_of_parameters_and_leave_the_base(base, name) -> None:
    before = {k: v.clone() for k, v in base.state_dict().items()}
    batch = random_batch(base, 2, 6)
    own = method_contenders.ours(base, batch, name, {})
    peft = method_contenders.theirs(base, batch, name, {})
    for contender in (own, peft):
        contender.step()
        contender.step()
    assert own.facts["parameters"] == peft.facts["parameters"] > 0
    assert own.facts["file_bytes"] > 4 * own.facts["parameters"] * (name != "lora-fa")
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_what_peft_lacks_has_no_contender(base) -> None:
    assert method_contenders.theirs(base, random_batch(base, 1, 4), "mos", {}) is None


def test_a_contender_s_step_lowers_its_loss(base) -> None:
    batch = random_batch(base, 2, 6)
    seen = []
    contender = method_contenders.ours(base, batch, "lora", {"rank": 8})
    model = contender.step.__closure__
    found = next(c.cell_contents for c in model if isinstance(c.cell_contents, torch.nn.Module))
    for _ in range(30):
        contender.step()
        seen.append(float(found(**batch).loss.detach()))
    assert seen[-1] < seen[0]


def test_products_of_lora_are_counted_in_full(base) -> None:
    """Beyond the base's: 6 r (in + out) a token, and none forgotten where products add in place."""
    batch = random_batch(base, 2, 8)
    alone = method_contenders.bound(base, batch)
    lora = method_contenders.ours(base, batch, "lora", {"rank": 8})
    extra = benchmark._flops(lora.step) - benchmark._flops(alone.step)
    assert extra == pytest.approx(6 * lora_count(base) * 2 * 8, rel=0.02)


def test_nested_calls_are_counted_once(monkeypatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(method_contenders.time, "process_time", lambda: float(next(ticks)))
    clock = method_contenders.Clock()
    inner = clock.wrap(lambda: None)
    clock.wrap(lambda: (inner(), inner()))()
    assert clock.seconds == 3.0  # the outer call's ticks 0 to 3; those of the inner ones lie within
    inner()
    assert clock.seconds == 4.0


def test_slow_contenders_take_one_round_and_ratios_are_of_the_same_rounds(monkeypatch) -> None:
    cost = {"lora": 1.0, "bound": 0.5, "peft": 20.0}
    now, calls = [0.0], []

    def contender(kind: str):
        def step() -> None:
            calls.append(kind)
            now[0] += cost[kind]

        return method_contenders.Contender(step)

    monkeypatch.setattr(benchmark.time, "process_time", lambda: now[0])
    found = benchmark._rounds({kind: contender(kind) for kind in cost}, 4)
    assert {kind: len(s) for kind, s in found.items()} == {"lora": 4, "bound": 4, "peft": 1}
    assert benchmark._ratio(found["peft"], found["lora"]) == 20
    assert calls[:3] == ["lora", "bound", "peft"]
    assert calls[3:5] == ["bound", "lora"]  # each starts a round in turn


def line(name: str, **more) -> dict:
    ratios = {"over_lora": 1.1, "over_bound": 1.2, "flops": 1050, "parameters": 5_000}
    return {
        "method": name,
        "axis": "parameterisation",
        "machine": {"date": "2026-01-01", "cpu": "any", "torch": "2"},
        "model": "six-layer",
        "rows": 1,
        "tokens": 2,
        "rounds": 3,
        "bound": {"flops": 1000},
        "lora": {"parameters": 4_000},
        "default": {**ratios, "file_bytes": 20_500, "attach_s": 0.5, "start_s": 0.1},
        **more,
    }


def test_the_share_of_peft_s_extra_is_beyond_the_products() -> None:
    peft = {"over_bound": 1.35, "over_lora": 1.3, "flops": 1080, "parameters": 5_000}
    assert method_table.extra(line("a", peft=peft)) == pytest.approx(0.15 / 0.30)
    assert method_table.extra(line("a")) is None
    assert method_table.extra(line("a", peft={**peft, "over_bound": 1.05})) is None


def test_the_last_good_line_counts_and_failed_methods_are_tried_again(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(method_table, "RESULTS", tmp_path)
    lines = [line("a"), line("b", error="no"), line("a", rounds=9), line("c", error="no")]
    text = "".join(json.dumps(x) + "\n" for x in lines)
    (tmp_path / "methods-six-layer.jsonl").write_text(text)
    found = method_table.read_results("six-layer")
    assert list(found) == ["a"] and found["a"]["rounds"] == 9
    assert method_table.read_results("smollm2") == {}


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch) -> None:
    for module in (benchmark, method_table):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    asked: list[str] = []

    def measured(args, name: str) -> dict:
        asked.append(name)
        if name == "vera" and asked.count("vera") == 1:
            raise KeyboardInterrupt
        return line(name) if name != "dora" else line(name, error="no")

    monkeypatch.setattr(benchmark, "_line", measured)
    args = argparse.Namespace(model="six-layer", methods=["lora", "dora", "vera"], again=False)
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(args)
    benchmark.run(args)
    assert asked == ["lora", "dora", "vera", "dora", "vera"]
    assert set(method_table.read_results("six-layer")) == {"lora", "vera"}


def test_the_report_has_a_row_for_each_method_and_a_plot(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    for name in ("RESULTS", "TABLE", "PLOT"):
        place = tmp_path if name == "RESULTS" else tmp_path / name.lower()
        monkeypatch.setattr(
            method_table, name, place.with_suffix(".png") if name == "PLOT" else place
        )
    peft = {"over_bound": 1.35, "over_lora": 1.3, "flops": 1080, "parameters": 5_000}
    budget = {"over_lora": 0.9, "options": {"rank": 6}, "parameters": 4_010}
    lines = [line("small", budget=budget), line("other", peft=peft)]
    text = "".join(json.dumps(x) + "\n" for x in lines)
    (tmp_path / "methods-six-layer.jsonl").write_text(text)
    assert method_table.write_report() == [tmp_path / "table", tmp_path / "plot.png"]
    table = (tmp_path / "table").read_text()
    rows = [r for r in table.splitlines() if r.startswith("| `")]
    cells = [[c.strip() for c in r.strip("|").split("|")] for r in rows]
    assert [c[0] for c in cells] == ["`other`", "`small`"]
    assert cells[0][:7] == ["`other`", "5 k", "20.5 kB", "1.10", "", "1.30", "0.50"]
    assert cells[1][4] == "0.90 (rank 6: 4.01 k)" and cells[1][5:8] == ["", "", "+5.0%"]
    assert len({len(c) for c in cells}) == 1
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_rules_stand_beside_adamw_on_what_they_train() -> None:
    lora = line("lora")
    lora["default"]["peak_mb"] = 1000.0
    bare, base = line("bare", axis="rule"), line("base", axis="rule", full={"peak_mb": 3000.0})
    bare["default"] |= {"peak_mb": 1020.0}
    base["default"] |= {"peak_mb": 2000.0, "over_full": 0.8}
    rows = method_table._rules({"lora": lora, "bare": bare, "base": base})
    assert rows[1:] == ["| `bare` | 1.10 | +20 MB |", "| `base` | 0.80 | -1,000 MB |"]
    assert method_table._rules({"lora": lora}) == []


def test_a_rule_over_base_weights_is_measured_beside_full_training(base) -> None:
    args = argparse.Namespace(rows=1, tokens=4)
    assert benchmark.make("full", args, base, "lora-plus") is None
    contender = benchmark.make("full", args, base, "lisa")
    contender.step()
    assert contender.facts["parameters"] == sum(p.numel() for p in base.parameters())
