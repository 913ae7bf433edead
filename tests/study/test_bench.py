"""One trial: the same training as `plait train`, on a base that is as it was afterwards."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from toy_tasks import OneMustWin

import plait
from plait.errors import PlaitError
from plait.study import RecipeTask, open_task
from plait.study.bench import Bench, checksum
from plait.study.contender import parse_contender, parse_contenders
from plait.study.job import Job
from plait.study.sizes import count_parameters, fit_to_budget
from plait.training.recipe import Recipe
from plait.training.trainer import train
from tiny_language_model import save_tiny_base, tiny_model


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("task")
    for name, count in (("train", 40), ("test", 12)):
        rows = [{"prompt": f"say {i % 5}", "completion": "abcde"[i % 5] * 3} for i in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return Recipe.make(
        {
            "base": str(save_tiny_base(folder / "base")),
            "data": str(folder / "train.jsonl"),
            "eval_data": str(folder / "test.jsonl"),
            "rank": 2,
            "steps": 6,
            "batch_size": 4,
            "max_length": 64,
            "lr": 1e-2,
            "seed": 3,
            "output": str(folder / "out"),
        }
    )


@pytest.mark.parametrize("name", ["lora", "lora-plus", "pissa"])
def test_a_trial_trains_as_plait_train_does(name: str, recipe: Recipe, tmp_path: Path) -> None:
    """The oracle is Hugging Face's Trainer, on the rows that the trial does not hold out."""
    task = RecipeTask(recipe, validation_rows=4)
    wanted = parse_contender(name, recipe).recipe(recipe)
    record = Bench(task).run(Job(name, wanted, "tune"))
    assert record["state"] == "done", record
    from plait.training.data import read_examples

    kept = list(read_examples(recipe.data))
    import random

    random.Random("held out").shuffle(kept)
    model = tiny_model()
    result = train(
        wanted.replace(output=str(tmp_path), log_every=1, export=[], parity=False, eval_data=None),
        model=model,
        tokenizer=task.data().tokenizer,
        data=kept[4:],
        quiet=True,
    )
    losses = [r["loss"] for r in result.history if "loss" in r]
    assert record["losses"] == pytest.approx(losses, abs=2e-4)


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_a_recipe_is_scored_on_its_test_rows(metric: str, recipe: Recipe) -> None:
    task = RecipeTask(recipe, metric, test_rows=10, max_new_tokens=4)
    scores = [float(s) for s in task.scores(task.load())]
    assert len(scores) == 10 and task.higher_is_better == (metric != "loss")
    if metric == "loss":
        from plait.evaluation import evaluate

        model, tokenizer = tiny_model(), task.data().tokenizer
        found = evaluate(model, tokenizer, recipe.eval_data, ["loss"], limit=10)
        assert sum(scores) / 10 == pytest.approx(found.results[0].scores["loss"].value, rel=1e-4)


def test_held_out_rows_are_not_trained_on(recipe: Recipe) -> None:
    task = RecipeTask(recipe.replace(eval_data=None), validation_rows=4)
    facts = task.facts()
    assert facts["training rows"] + facts["validation rows"] + facts["test rows"] == 40
    assert facts["test rows"] == 8 and facts["validation rows"] == 4


def test_a_trial_past_its_deadline_stops_and_leaves_the_base_whole() -> None:
    bench = Bench(OneMustWin())
    before = checksum(bench.base())
    shared = bench.task.recipe
    for name in ("lora", "paca", "pissa"):
        wanted = parse_contender(name, shared).recipe(shared, lr=1e-2, seed=0, steps=20)
        record = bench.run(Job(name, wanted, "tune", deadline=time.time() - 1))
        assert record["state"] == "stopped"
        assert bench.run(Job(name, wanted, "tune"))["state"] == "done"
        assert bench.model is not None and checksum(bench.model) == before
        assert not plait.adapters(bench.model)


def test_a_change_of_one_number_changes_the_checksum() -> None:
    model = OneMustWin().load()
    before = checksum(model)
    with torch.no_grad():
        weight = dict(model.named_parameters())["first.weight"]
        weight[:2] = weight[:2].flip(0)  # the same numbers, elsewhere
    assert checksum(model) != before


def test_pruned_trials_say_what_they_had() -> None:
    bench, shared = Bench(OneMustWin()), OneMustWin.recipe
    wanted = parse_contender("lora", shared).recipe(shared, lr=1e-2, seed=0, steps=20)
    record = bench.run(Job("lora", wanted, "tune", rivals={5: [0.0]}))
    assert record["state"] == "pruned" and list(record["rungs"]) == ["5"]
    assert len(record["losses"]) == 5 and "loss" not in record


@pytest.mark.parametrize("name", ["dora", "lora-sb", "hra", "fourierft", "lora-xs", "randlora"])
def test_sizes_come_near_the_budget_and_are_what_is_trained(name: str) -> None:
    model, shared = tiny_model(), Recipe(options={"rank": 4}, targets="all-linear")
    budget = count_parameters(model, shared)
    sized, count = fit_to_budget(model, parse_contender(name, shared), shared, budget)
    adapter = plait.attach(
        model, sized.method, targets="all-linear", data=(), initializer=quiet(), **sized.options
    )
    assert adapter.num_parameters() == count
    plait.detach(model)
    assert 0.5 < count / budget < 2, (name, sized.options)


def quiet() -> plait.adapter.Initializer:
    from plait.training.dryrun import _Untouched

    return _Untouched()


def test_contenders_are_put_together_from_pieces() -> None:
    shared = Recipe(options={"rank": 4}, rules=["ema"])
    found = parse_contenders("lora,dora:rank=2,dora+pissa,lora-plus:ratio=4,galore,recipe", shared)
    by = {c.label: c.recipe(shared) for c in found}
    assert by["lora"].options == {"rank": 4} and by["lora"].rules == []
    assert by["dora:rank=2"].options == {"rank": 2}
    assert by["dora+pissa"].method == "dora" and by["dora+pissa"].initializer == {"pissa": {}}
    assert by["lora-plus:ratio=4"].rules == [{"lora-plus": {"ratio": 4.0}}]
    assert by["galore"].method == "none" and by["recipe"] == shared


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loar", "did you mean 'lora'"),
        ("lora,lora", "twice"),
        ("lora+dora", "two methods"),
        ("lora:rnak=3", "'rank'"),
        ("lora+pissa:niter=2", "niter"),
        ("", "no methods"),
    ],
)
def test_what_is_no_contender_is_said_at_once(text: str, words: str) -> None:
    with pytest.raises(PlaitError, match=words):
        parse_contenders(text, Recipe())


def test_tasks_are_found_by_name(tmp_path: Path) -> None:
    assert open_task("toy_tasks:WINNER").name == "toy"
    assert open_task(f"{Path(__file__).parent / 'toy_tasks.py'}:OneMustWin").name == "toy"
    for wrong in ("toy_tasks:NOTHING", "no_such_module:x", "toy_tasks", "toy_tasks:WIDTH"):
        with pytest.raises(PlaitError, match="task"):
            open_task(wrong)
