"""The merging benchmark: fair tuning, exact figures, runs that resume, and its report."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

import plait
from plait.adapter import low_rank_of
from plait.merging import merge_method_names

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.merging import __main__ as command  # noqa: E402
from benchmarks.merging import bench as benching  # noqa: E402
from benchmarks.merging import measure, page, results, tasks  # noqa: E402
from benchmarks.merging.contenders import KNOBS, SEARCHES, Contender, contenders  # noqa: E402
from benchmarks.merging.experts import Recipe, factor  # noqa: E402
from benchmarks.merging.results import Summary  # noqa: E402
from benchmarks.merging.scorer import Scorer, Words, batches, joined  # noqa: E402
from benchmarks.merging.searches import search_labels, search_row  # noqa: E402
from benchmarks.merging.tune import tune  # noqa: E402
from benchmarks.tasks.rows import choice  # noqa: E402

SMALL = {"map": 21, "m2n2": 6, "lorahub": 6, "octo-planner": 8}
"""Evaluations of searches that cannot do with four."""
WORDS = [f"w{i}" for i in range(40)]


class Tokenizer:
    """Words to their numbers, as a tokenizer of transformers answers."""

    def __call__(self, texts, truncation, max_length, padding, return_tensors):
        lines = [[2 + WORDS.index(w) for w in t.split()][:max_length] for t in texts]
        width = max(map(len, lines))
        ids = torch.tensor([line + [0] * (width - len(line)) for line in lines])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=42,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return Scorer(BertModel(config, add_pooling_layer=False)).eval()


def task(name: str, kind: tasks.Kind, turn: int) -> tasks.Task:
    """Which of two words a row holds; which word means what differs from task to task."""

    def rows():
        options = ["w1", "w2"] if turn % 2 else ["w2", "w1"]
        made = []
        for i in range(200):
            side = i % 2
            filler = f"w{3 + i % 30} w{3 + i // 30} w{3 + 4 * turn}"
            made.append(choice(f"{filler} w{35 + side}", options, options[side]))
        return made

    return tasks.Task(name, kind, rows)


@pytest.fixture(scope="module")
def bench(scorer, tmp_path_factory) -> benching.Bench:
    made = [task(f"task{i}", "held-in", i) for i in range(3)]
    made += [task("other", "held-out", 4), task("plain", "general", 5)]
    recipe = Recipe(rank=2, alpha=4.0, lr=2e-2, batch=8, steps=20, joint_steps=20)
    runs = tmp_path_factory.mktemp("runs")
    return benching.Bench(scorer, Tokenizer(), made, recipe, runs, (60, 8, 20, 12), budget=4)


# -- rows and answers -----------------------------------------------------------------------------


def test_rows_are_even_over_answers() -> None:
    rows = [choice(str(i), ["a", "b"], "a" if i else "b") for i in range(9)]
    assert [r["answer"] for r in tasks.even(rows, 4)].count("b") == 1
    own = [choice(str(i), [str(i), "x"], "x") for i in range(5)]
    assert tasks.even(own, 3) == own[:3]


def test_prompts_and_labels_are_worded_for_an_encoder() -> None:
    assert tasks._words("HassSetVolume") == "set volume"
    assert tasks._category("Food & Drink") == "food and drink"
    assert tasks._goal("The most reasonable goal of 'Don't wait' is ") == "Don't wait"


def test_padding_and_batching_change_no_answer(scorer) -> None:
    words = Words(scorer, Tokenizer())
    made = tasks.Task("t", "held-in", list)
    rows = [choice("w3 w4 w5", ["w1", "w2", "w7"], "w2"), choice("w9", ["w1", "w8"], "w8")]
    alone = words.encode(made, rows)
    with torch.no_grad():
        together = scorer(**joined(alone))
        single = [scorer(**row) for row in alone]
    torch.testing.assert_close(together.logits[0], single[0].logits[0])
    torch.testing.assert_close(together.logits[1, :2], single[1].logits[0])
    assert together.logits[1, 2] == -1e4
    assert sum(len(b["labels"]) for b in batches(alone * 5, size=4)) == 10


def test_logits_are_cosines_with_the_base_s_options(scorer) -> None:
    words = Words(scorer, Tokenizer())
    (row,) = words.encode(tasks.Task("t", "held-in", list), [choice("w3", ["w1", "w2"], "w1")])
    with torch.no_grad():
        states = [
            scorer.encoder(input_ids=torch.tensor([[2 + n]])).last_hidden_state.mean(1)[0]
            for n in (3, 1, 2)
        ]
        cosines = [torch.cosine_similarity(states[0], s, dim=0) for s in states[1:]]
        torch.testing.assert_close(scorer(**row).logits[0], torch.stack(cosines) / 0.05)


# -- measuring ------------------------------------------------------------------------------------


def test_a_fold_is_the_adapter_and_leaves_no_trace(bench) -> None:
    adapter = bench.experts[0]
    change = measure.changes(adapter)
    before = {n: p.clone() for n, p in bench.scorer.named_parameters()}
    path = next(iter(change))
    with measure.folded(bench.scorer, change, 0.5):
        weight = bench.scorer.get_submodule(path).weight.float()
        wanted = before[f"{path}.weight"] + 0.5 * low_rank_of(adapter.deltas[path])[0].dense()
        torch.testing.assert_close(weight, wanted, atol=1e-2, rtol=1e-2)
    for name, p in bench.scorer.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, before[name])


def test_norms_and_shares_are_what_they_say(bench) -> None:
    change = measure.changes(bench.experts[0])
    squares = sum(float(low.dense().detach().square().sum()) for low in change.values())
    assert measure.norm(change) == pytest.approx(math.sqrt(squares), rel=1e-5)
    found = {"a": {"accuracy": 0.5}, "b": {"accuracy": 0.9}}
    base = {"a": {"accuracy": 0.4}, "b": {"accuracy": 0.5}}
    experts = {"a": 0.8, "b": 0.9}
    assert measure.normalised(found, experts, ["a", "b"]) == [0.625, 1.0]
    assert measure.recovered(found, base, experts, ["a", "b"]) == pytest.approx(0.5 / 0.8)


# -- tuning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [0.2, 1.0, 3.0, 11.0])
def test_tuning_spends_its_budget_and_comes_near_the_best(best) -> None:
    asked = []

    def ask(knob, c):
        asked.append((knob, c))
        return -abs(math.log(c / best))

    found = tune(ask, budget=8)
    assert len(found.asked) == len(asked) == len(set(asked)) == 8
    assert asked[0] == (None, 1.0)
    assert abs(math.log2(found.factor / best)) < 0.3


def test_every_knob_has_its_turn_at_the_norm_that_was_best() -> None:
    norms = {"whole": 1.0, "half": 0.5, "none": 0.0}
    asked = []

    def ask(knob, c):
        asked.append((knob, c))
        return -abs(math.log(max(norms[knob], 0.01) * c / 4)) - (knob != "half")

    found = tune(ask, ["whole", "half", "none"], norms.get, budget=8)
    assert ("half", 8.0) in asked and "none" in {knob for knob, _ in asked}
    assert (found.knob, found.factor) == ("half", 8.0) and len(asked) == 8


def test_the_best_is_kept_when_everything_else_is_worse() -> None:
    found = tune(lambda knob, c: 1.0 if (knob, c) == (1, 1.0) else 0.0, [1, 2, 3])
    assert (found.knob, found.factor, found.value, len(found.asked)) == (1, 1.0, 1.0, 8)


# -- experts and contenders -----------------------------------------------------------------------


def test_experts_learn_their_tasks_and_are_kept(bench, monkeypatch) -> None:
    for name in bench.held_in:
        own = bench.expert_scores[name]["loss"]
        assert own < bench.base_scores[name]["loss"]
    assert not plait.adapters(bench.scorer)
    monkeypatch.setattr(
        "benchmarks.merging.experts._train", lambda *a: pytest.fail("trained again")
    )
    again = bench.one("task0", ["task0"])
    for path, delta in again.deltas.items():
        torch.testing.assert_close(delta.dense(), bench.experts[0].deltas[path].dense())
    assert len({Recipe().folder("a"), Recipe(lr=1e-4).folder("a"), Recipe().folder("b")}) == 3
    assert Recipe().folder("a") == Recipe(joint_steps=9).folder("a") != Recipe(steps=9).folder("a")
    assert Recipe().folder("joint") != Recipe(joint_steps=9).folder("joint")


def test_the_rate_rises_and_falls_to_zero() -> None:
    rates = [factor(step, 100) for step in range(100)]
    assert rates[9] == 1.0 and rates[0] == 0.1 and rates[99] < 0.001 and max(rates) == 1.0


def test_every_merge_method_enters_with_knobs_that_it_has() -> None:
    entered = contenders()
    assert set(merge_method_names()) <= {c.label for c in entered}
    assert len({c.label for c in entered}) == len(entered)
    for method, (option, values) in KNOBS.items():
        assert len(values) <= 3
        for value in values:
            made = plait.merging.get_merge_method(method).merge(**{option: value})
            assert getattr(made, option) == value


@pytest.mark.parametrize("label", [c.label for c in contenders()])
def test_every_contender_runs(bench, label) -> None:
    contender = next(c for c in contenders() if c.label == label)
    line = bench.row(contender)
    assert set(bench.held_in) <= set(line["tasks"])
    assert line["evaluations"] == (bench.budget if contender.tuned else 0)
    assert all(0 <= score["accuracy"] <= 1 for score in line["tasks"].values())
    assert not plait.adapters(bench.scorer)


@pytest.mark.parametrize("label", search_labels())
def test_every_search_runs(bench, label, monkeypatch) -> None:
    monkeypatch.setitem(SEARCHES, label, (SMALL.get(label, 4), SEARCHES[label][1]))
    line = search_row(bench, label)
    assert set(line["tasks"]) == set(bench.kinds) and line["evaluations"] == SMALL.get(label, 4)
    assert not plait.adapters(bench.scorer)


def test_the_line_is_the_merge_of_the_stored_choice(bench) -> None:
    line = bench.row(Contender("linear", "linear"))
    merged = plait.merge(bench.experts, "linear")
    again = measure.score_all(bench.scorer, bench.test, measure.changes(merged), line["factor"])
    assert again == line["tasks"]
    best = max(line["asked"], key=lambda one: one[2])
    assert (line["value"], line["factor"]) == (best[0], best[1])


def test_references_are_the_base_the_experts_and_one_trained_on_all(bench) -> None:
    base, own, joint = bench.references()
    assert base["tasks"] == measure.score_all(bench.scorer, bench.test, {})
    assert list(own["tasks"]) == bench.held_in
    assert set(joint["tasks"]) == set(bench.kinds) and joint["tasks"] != base["tasks"]
    assert bench.recipe.folder("joint-3", bench.runs).is_dir()


def test_methods_of_two_inputs_merge_all_experts(bench) -> None:
    merged = bench.merged(Contender("slerp", "slerp"))
    first = plait.merge(bench.experts[:2], "slerp", [0.5, 0.5])
    wanted = plait.merge([first, bench.experts[2]], "slerp", [2 / 3, 1 / 3])
    for path, delta in merged.deltas.items():
        torch.testing.assert_close(delta.dense(), wanted.deltas[path].dense())


def test_a_task_that_is_known_gets_its_own_merge(bench) -> None:
    one_hot = lambda i, k: {"weights": [float(i == j) for j in range(k)]}  # noqa: E731
    line = bench.row(Contender("own", "linear", tuned=False, own=one_hot))
    for name in bench.held_in:
        assert line["tasks"][name] == bench.expert_scores[name]


# -- lines and pages ------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_and_errors_are_tried_again(
    bench, tmp_path, monkeypatch
) -> None:
    file = tmp_path / "merging.jsonl"
    monkeypatch.setattr(command, "append", lambda line: results.append(line, file))
    monkeypatch.setattr(command, "read_results", lambda: results.read_results(file))
    monkeypatch.setattr(command, "open_bench", lambda count: bench)
    asked: list[str] = []

    def row(contender):
        asked.append(contender.label)
        if contender.label == "ties" and asked.count("ties") == 1:
            raise KeyboardInterrupt
        if contender.label == "dare" and asked.count("dare") == 1:
            raise ValueError("no")
        return {"label": contender.label, "tasks": {}}

    monkeypatch.setattr(bench, "row", row)
    with pytest.raises(KeyboardInterrupt):
        command.run(3, ["linear", "dare", "ties"], again=False)
    command.run(3, ["linear", "dare", "ties"], again=False)
    assert asked == ["linear", "dare", "ties", "dare", "ties"]
    assert set(results.read_results(file)) == {("linear", 3), ("dare", 3), ("ties", 3)}


def lines() -> dict[results.Key, dict]:
    kinds = {"a": "held-in", "b": "held-in", "c": "held-out", "d": "general"}

    def line(label, a, b, c, d, **more):
        found = zip(kinds, (a, b, c, d), strict=True)
        return {
            "label": label,
            "tasks": {name: {"accuracy": v, "loss": 1.0} for name, v in found if v is not None},
            "kinds": kinds,
            "machine": {"date": "2026-01-01", "cpu": "any", "torch": "2"},
            "setting": {"rows": 1, "others": 1, "validation": 1, "budget": 8},
            **more,
        }

    found = [
        line("base", 0.2, 0.4, 0.5, 0.8),
        line("own experts", 0.8, 0.8, None, None),
        line("linear", 0.4, 0.6, 0.55, 0.8, tuning_s=4.0, merge_s=0.1, rank=64),
        line("ties", 0.6, 0.8, 0.45, 0.4, tuning_s=9.0, merge_s=0.2, rank=64, needs=["gram"]),
        line("known", 0.8, 0.8, None, None, tuning_s=0.0, merge_s=0.2, rank=8),
    ]
    return {(one["label"], 8): one for one in found}


def test_summaries_normalise_by_the_experts_and_the_base() -> None:
    summary = Summary.of(lines())
    assert summary.normalised("ties") == pytest.approx([0.75, 1.0])
    assert summary.held_in("ties") == pytest.approx(0.875)
    assert summary.recovered("base") == 0.0 and summary.recovered("own experts") == 1.0
    assert summary.recovered("ties") == pytest.approx(0.4 / 0.5)
    assert summary.gains("linear", "base", "held-out") == [pytest.approx(0.05)]
    assert summary.kept("ties") == [0.5] and not summary.complete(["ties", "dare"])


def test_the_report_says_what_the_lines_say(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(page, "read_results", lines)
    monkeypatch.setattr(page, "TABLE", tmp_path / "table.md")
    monkeypatch.setattr(page, "draw", lambda s: page_draw(s, tmp_path / "plot.png"))
    assert page.write_report() == [tmp_path / "table.md", tmp_path / "plot.png"]
    rows = [r for r in (tmp_path / "table.md").read_text().splitlines() if r.startswith("| ")]
    cells = [[c.strip() for c in r.strip("|").split("|")] for r in rows]
    assert [c[0] for c in cells[2:]] == ["*base*", "*own experts*", "known", "ties", "linear"]
    assert cells[5][1:5] == ["0.875", "0.80", "+0.250 ± 0.000", "-5.0"]
    assert cells[5][5:] == ["0.50", "gram", "64", "0.20", "9"]
    assert cells[4][4:6] == ["", ""] and cells[4][9] == "as it comes"
    assert len({len(c) for c in cells}) == 1
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


page_draw = page.draw
