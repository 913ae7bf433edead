"""Rows of every accepted form become examples; every other row is refused with its place."""

import json
from pathlib import Path

import pytest

from plait.errors import FormatError
from plait.training.data import Example, parse_row, read_examples, read_jsonl

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write(path: Path, *lines: str | bytes) -> Path:
    encoded = [line if isinstance(line, bytes) else line.encode() for line in lines]
    path.write_bytes(b"\n".join(encoded))
    return path


def chat(example: Example) -> list[tuple[str, str, bool]]:
    return [(m.role, m.content, m.train) for m in example.chat()]


QA = [("user", "q", False), ("assistant", "a", True)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"prompt": "q", "completion": "a"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, TURNS[1]]},
        {"id": 7, "text": None, "messages": TURNS},
    ],
)
def test_every_form_says_the_same(row: dict) -> None:
    assert chat(parse_row(row)) == QA


def test_alpaca_input_follows_the_instruction() -> None:
    row = {"instruction": "Translate.", "input": "Haus", "output": "house"}
    assert parse_row(row).prompt == "Translate.\n\nHaus"


def test_plain_text() -> None:
    assert parse_row({"text": " two words "}) == Example("text", text=" two words ")


def test_only_answers_are_trained_and_only_those_asked_for() -> None:
    system = {"role": "system", "content": "s"}
    early = {"role": "assistant", "content": "bad", "weight": 0}
    row = {"messages": [system, TURNS[0], early, *TURNS]}
    assert [train for _, _, train in chat(parse_row(row))] == [False, False, False, False, True]
    given = {"prompt": [*TURNS, TURNS[0]], "completion": [TURNS[1]]}
    assert [train for _, _, train in chat(parse_row(given))] == [False, False, False, True]


def test_tool_calls_reach_the_template() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    example = parse_row({"messages": [TURNS[0], call], "tools": [{"name": "f"}]})
    assert example.messages[1].as_dict() == {**call, "content": ""}
    assert example.tools == ({"name": "f"},)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([1], "a list"),
        ({}, "its keys: none"),
        ({"question": "q", "answer": "a"}, r"keys: question, answer.*messages.*prompt \+ compl"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "no known form"),
        ({"messages": []}, "messages must be a list with entries, it is an empty list"),
        ({"messages": "hi"}, "it is a string"),
        ({"messages": ["hi"]}, r"messages\[1\] must be an object"),
        ({"messages": [TURNS[0], {"role": "bot", "content": "a"}]}, r"\[2\]: role is 'bot'"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": 5}]}, "a number"),
        ({"messages": [TURNS[0], {"role": "assistant"}]}, r"messages\[2\].content .* null"),
        ({"messages": TURNS[:1]}, "no assistant message"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, TURNS[1]]}, "only text"),
        ({"prompt": "q", "completion": ["a"]}, "a string and a list"),
        ({"instruction": ["q"], "output": "a"}, "instruction must be a string, it is a list"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "'alien', not one of .*human"),
        ({"conversations": [{"from": ["x"], "value": "q"}]}, "not one of"),
        ({"conversations": [{"role": "user", "content": "q"}]}, "from and value"),
        ({"text": "  "}, "text is empty"),
        ({"text": True}, "true or false"),
    ],
)
def test_a_wrong_row_is_told_with_its_place(row: object, says: str) -> None:
    with pytest.raises(FormatError, match=f"^here:3: .*{says}"):
        parse_row(row, "here:3")


def test_jsonl_keeps_order_skips_blank_lines_and_knows_line_numbers(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "größe", "completion": "a"}, ensure_ascii=False)
    path = write(
        tmp_path / "d.jsonl", b"\xef\xbb\xbf" + row.encode(), "", "  ", '{"text": "t"}', ""
    )
    first, second = read_jsonl(path)
    assert (first.prompt, second.text) == ("größe", "t")
    assert [first.origin, second.origin] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "a"', r":2: malformed JSON at column 13"),
        ('{"text": "a"} {"text": "b"}', ":2: malformed JSON .*Extra data"),
        ('{"a": 1}', ":2: no known form"),
        (b'{"text": "\xff"}', ":2: byte 11 is not UTF-8"),
        ("[" * 100_000, ":2: malformed JSON .*nested"),
        ('{"text": "' + "x" * 200_000 + '"}', r":2: the line is longer than 150,000 bytes"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str | bytes, says: str) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "fine"}', line)
    with pytest.raises(FormatError, match=says) as caught:
        list(read_jsonl(path, max_line_bytes=150_000))
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(FormatError, match="has no rows"):
        list(read_jsonl(write(tmp_path / "d.jsonl", content)))


def test_an_array_or_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="JSON array"):
        list(read_jsonl(write(tmp_path / "d.json", '[{"text": "a"}]')))
    with pytest.raises(FormatError, match="is a directory"):
        list(read_jsonl(tmp_path))


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "fine"}', "broken")
    assert next(read_jsonl(path)).text == "fine"


def test_sources_other_than_a_path(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "one"}')
    rows = [{"text": "two"}, Example("text", text="three"), path]
    assert [example.text for example in read_examples(rows)] == ["two", "three", "one"]
    with pytest.raises(FormatError, match="row 2: no known form"):
        list(read_examples([{"text": "a"}, {"b": "c"}]))
    with pytest.raises(FormatError, match="one mapping"):
        list(read_examples({"train": []}))
    with pytest.raises(FormatError, match="not 5"):
        list(read_examples(5))


def test_a_datasets_dataset_is_read() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": "q", "completion": "a"}] * 2)
    assert [chat(example) for example in read_examples(data)] == [QA, QA]
