"""The recipe: one set of names for YAML, command line and Python, checked before loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from plait.errors import PlaitError, UnknownNameError
from plait.training.recipe import FIELDS, Recipe

YAML = """
base: smollm2-135m
method: lora
options: {rank: 16, alpha: 32}
targets: [q_proj, v_proj]
rules: [lora-plus]
data: train.jsonl
lr: 1e-3
steps: 200
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML)
    return path


def test_yaml_values_have_their_fields_types(file: Path) -> None:
    recipe = Recipe.load(file)
    # YAML 1.1 reads 1e-3 as text; the field's type makes it the number it is.
    assert recipe.lr == 1e-3 and isinstance(recipe.lr, float)
    assert recipe.options == {"rank": 16, "alpha": 32.0}
    assert recipe.targets == ["q_proj", "v_proj"] and recipe.rules == ["lora-plus"]


def test_overrides_are_typed_by_the_field(file: Path) -> None:
    changes = ["lr=2e-5", "packing=true", "targets=all-linear", "layers=[0, 2]", "steps=none"]
    recipe = Recipe.load(file, changes)
    assert recipe.lr == 2e-5 and recipe.packing is True and recipe.targets == "all-linear"
    assert recipe.layers == [0, 2] and recipe.steps is None


def test_method_options_are_reached_by_path_and_by_their_short_name(file: Path) -> None:
    recipe = Recipe.load(file, ["options.alpha=8", "rank=4", "dropout=0.05"])
    assert recipe.options == {"rank": 4, "alpha": 8.0, "dropout": 0.05}


def test_rules_are_reached_by_path(file: Path) -> None:
    recipe = Recipe.load(file, ["rules.lora-plus.ratio=8", "rules.lora_pro.moments=none"])
    assert recipe.rules == [{"lora-plus": {"ratio": 8.0}}, {"lora-pro": {"moments": "none"}}]
    assert Recipe.load(file, ["rules=[]"]).rules == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "did you mean 'steps'"),
        ("rnak=3", "did you mean 'rank'"),
        ("options.alpa=3", "did you mean 'alpha'"),
        ("rules.lora-plus.ration=3", "did you mean 'ratio'"),
        ("rules.lora-puls.ratio=3", "did you mean 'lora-plus'"),
        ("method=loar", "did you mean 'lora'"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest(
    file: Path, override: str, message: str
) -> None:
    with pytest.raises(UnknownNameError, match=message):
        Recipe.load(file, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=many", "steps is 'many', where"),
        ("rank=2.5", "options.rank is 2.5"),
        ("scheduler=cosin", "scheduler is 'cosin'"),
        ("batch_size=0", "batch_size is 0; at least 1"),
        ("steps=0", "steps is 0"),
        ("rules=[lora]", "'lora' is no rule"),
        ("rules.lora-plus.ratio=fast", "rules.lora-plus.ratio is 'fast'"),
        ("steps", "key=value"),
        ("steps.now=3", "holds no further keys"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(
    file: Path, override: str, message: str
) -> None:
    with pytest.raises(PlaitError, match=message):
        Recipe.load(file, [override])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlaitError, match="no such file"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(PlaitError, match="not readable as YAML"):
        Recipe.load(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(PlaitError, match=r"lines of .key: value. are wanted"):
        Recipe.load(tmp_path / "list.yaml")


def test_a_dump_is_the_whole_recipe_and_reads_back_equal(file: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(file, ["rules.lora-pro.betas=[0.8, 0.9]", "rank=3", "overrides.up.rank=2"])
    text = recipe.dump()
    assert set(yaml.safe_load(text)) == set(FIELDS)
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert Recipe.load(again) == recipe


def test_making_a_recipe_does_not_change_what_it_was_made_from() -> None:
    values = {"options": {"rank": 2}, "rules": ["lora-plus"]}
    Recipe.make(values, ["rank=5", "rules.lora-plus.ratio=2"])
    assert values == {"options": {"rank": 2}, "rules": ["lora-plus"]}


def test_none_takes_no_options() -> None:
    with pytest.raises(PlaitError, match="rank"):
        Recipe.make({"method": "none"}, ["rank=3"])


@pytest.mark.parametrize(
    ("values", "rows", "processes", "total"),
    [
        ({"steps": 7}, 100, 1, 7),
        ({"epochs": 2, "batch_size": 8}, 100, 1, 26),
        ({"epochs": 1, "batch_size": 8, "gradient_accumulation": 4}, 100, 1, 4),
        ({"epochs": 1, "batch_size": 8}, 100, 2, 7),
        ({"epochs": 0.5, "batch_size": 1}, 3, 1, 2),
    ],
)
def test_total_steps_count_whole_batches(values, rows, processes, total) -> None:
    assert Recipe.make(values).total_steps(rows, processes) == total


def test_warmup_is_a_share_below_one_and_a_count_above() -> None:
    assert Recipe(warmup=0.03).warmup_steps(100) == 3
    assert Recipe(warmup=10).warmup_steps(100) == 10
    assert Recipe(warmup=0).warmup_steps(100) == 0
