"""The generated tasks: reproducible, split honestly, and right about their own answers."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("hassil")
pytest.importorskip("home_assistant_intents")

from hassil.intents import Intents, TextSlotList
from hassil.recognize import recognize_all
from home_assistant_intents import get_intents

from plait.quickstart.tasks import TASKS, home, prompt, reference
from plait.training.data import read_jsonl

Rows = tuple[list[dict], list[dict]]


@pytest.fixture(scope="module")
def rows() -> dict[str, Rows]:
    pytest.importorskip("reasoning_gym")
    return {name: task.generate(0) for name, task in TASKS.items()}


def questions(rows: list[dict]) -> list[str]:
    return [row["messages"][1]["content"] for row in rows]


@pytest.mark.parametrize("name", TASKS)
def test_train_and_test_share_no_question(name: str, rows: dict[str, Rows]) -> None:
    train, test = (questions(part) for part in rows[name])
    assert 600 <= len(train) == len(set(train)) <= 1200
    assert 100 <= len(test) == len(set(test)) <= 150
    assert not set(train) & set(test)


@pytest.mark.parametrize("name", TASKS)
def test_the_files_depend_on_the_seed_only(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    paths = [*task.make(tmp_path / "a", seed=5), *task.make(tmp_path / "b", seed=5)]
    other = task.make(tmp_path / "c", seed=6)
    content = [path.read_bytes() for path in paths]
    assert content[:2] == content[2:] and other[0].read_bytes() != content[0]
    assert [path.name for path in paths] == ["train.jsonl", "test.jsonl"] * 2
    example = next(read_jsonl(paths[0]))
    assert [message.role for message in example.messages] == ["system", "user", "assistant"]
    assert example.messages[-1].train


@pytest.mark.parametrize("name", TASKS)
def test_the_score_takes_the_reference_and_nothing_less(name: str, rows: dict[str, Rows]) -> None:
    score, test = TASKS[name].score, rows[name][1]
    for row, other in pairwise(test):
        right = reference(row)
        assert score(right, row) and score(f" {right}\n", row)
        assert score(reference(other), row) == (reference(other) == right)
        for wrong in ("", right[:-1], right + " and more", f"Sure! {right}"):
            assert not score(wrong, row)
    assert prompt(test[0]) == test[0]["messages"][:2]


@pytest.mark.parametrize("language", ["en", "de"])
def test_no_template_is_on_both_sides(language: str) -> None:
    templates, _ = home._load(language)
    train, test = home.split(templates, random.Random(0))
    assert len(train) + len(test) == len(templates)
    train_texts = {(item.intent, item.text) for item in train}
    test_texts = {(item.intent, item.text) for item in test}
    assert not train_texts & test_texts
    assert len({intent for intent, _ in test_texts}) >= 10
    assert {intent for intent, _ in train_texts} == set(home.TAKEN)


@pytest.mark.parametrize("language", ["en", "de"])
def test_rows_come_from_their_side_of_the_split(
    language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, str]] = []
    load = home._load

    def recording(language: str) -> tuple:
        templates, drawing = load(language)

        def record(template: home.Template, draw: random.Random) -> tuple[str, str]:
            drawn.append((template.intent, template.text))
            return drawing(template, draw)

        return templates, record

    monkeypatch.setattr(home, "_load", recording)
    counts = []
    sentences = home._sentences

    def counting(*args: object, **options: object) -> dict[str, str]:
        found = sentences(*args, **options)
        counts.append(len(drawn))
        return found

    monkeypatch.setattr(home, "_sentences", counting)
    home.generate(language, seed=0)
    border = counts[0]
    assert not set(drawn[:border]) & set(drawn[border:])


@pytest.mark.parametrize("language", ["en", "de"])
def test_hassils_own_recogniser_reads_the_sentences_the_same_way(
    language: str, rows: dict[str, Rows]
) -> None:
    data = get_intents(language)
    data["intents"] = {name: data["intents"][name] for name in home.TAKEN}
    lists = home._lists(home.WORDS[language])
    names = [(v.text_in.text, v.value_out, v.metadata) for v in lists["name"].values]
    slots = {"name": TextSlotList.from_tuples(names), "area": lists["area"]}
    slots["floor"] = TextSlotList.from_strings(["ground"])
    intents = Intents.from_dict(data)
    train, test = rows[f"home_{language}"]
    for row in random.Random(0).sample(train, 40) + random.Random(0).sample(test, 20):
        wanted = json.loads(reference(row))
        readings = []
        for result in recognize_all(
            row["messages"][1]["content"], intents, slot_lists=slots, intent_context={"area": "?"}
        ):
            found = {name: entity.value for name, entity in result.entities.items()}
            if found.get("area") == "?":
                del found["area"]
            if isinstance(found.get("item"), str):  # a wildcard may keep a space
                found["item"] = found["item"].strip()
            readings.append({"intent": result.intent.name, **found})
        assert wanted in readings, row["messages"][1]["content"]


def test_home_rows_cover_the_intents_and_keep_one_key_order(rows: dict[str, Rows]) -> None:
    for language in ("en", "de"):
        train, test = rows[f"home_{language}"]
        calls = [json.loads(reference(row)) for row in train + test]
        assert {call["intent"] for call in calls} == set(home.TAKEN)
        assert all(next(iter(call)) == "intent" for call in calls)
        assert max(Counter(call["intent"] for call in calls).values()) < len(calls) / 4


def test_reasoning_answers_are_sorted_as_asked(rows: dict[str, Rows]) -> None:
    for row in [*rows["reasoning"][0], *rows["reasoning"][1]]:
        order, _, given = row["messages"][1]["content"].partition(" order: ")
        numbers = sorted(map(int, given.split(",")), reverse=order == "Sort in descending")
        assert reference(row) == ", ".join(map(str, numbers))
