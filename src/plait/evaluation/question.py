"""What a model is asked: rows of the training forms, with the last answer taken off.

Any row that can be trained on can be asked (its last assistant turn is the reference). A row may
also have `choices`, a list of options, with `answer` naming the right one by text or index:

    {"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plait.errors import FormatError, PlaitError
from plait.training.data import Example, parse_row


@dataclass(frozen=True)
class Question:
    """One row: `example` is the whole of it, `answer` the reference, `row` what a scorer sees."""

    example: Example
    answer: str
    choices: tuple[str, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def correct(self) -> int:
        """The index of the right choice."""
        return self.choices.index(self.answer)

    @property
    def asked(self) -> str:
        """What is asked, for people to read: the prompt, or the turn before the answer."""
        turns = [m.content for m in self.example.messages[:-1]] or [self.example.prompt]
        return turns[-1] or ""

    def answered(self, answer: str) -> Example:
        """The example with another answer."""
        if self.example.kind == "completion":
            return replace(self.example, completion=answer)
        *before, last = self.example.messages
        return replace(self.example, messages=(*before, replace(last, content=answer)))

    def prompt(self, tokenizer: Any, template: bool = True) -> str:
        """The text up to where the answer begins, special tokens included."""
        example = self.example
        if example.kind == "text":
            raise PlaitError(f"{_at(example.origin)}plain text has no question; use metric 'loss'.")
        if example.kind == "completion" and not template:
            return example.prompt
        if not template or not getattr(tokenizer, "chat_template", None):
            raise PlaitError(
                f"{_at(example.origin)}a chat template is needed here and the tokenizer has none; "
                "use prompt + completion rows with template=False."
            )
        turns = [message.as_dict() for message in example.chat()[:-1]]
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        if example.tools:
            options["tools"] = list(example.tools)
        return tokenizer.apply_chat_template(turns, **options)


def read_questions(source: Any) -> list[Question]:
    """Questions from a .jsonl path, several paths, or rows (dicts, `Example`s, `Question`s).

    FormatError names the file and line of a row that has no known form.
    """
    found = [_question(row, origin) for row, origin in rows_of(source)]
    if not found:
        raise FormatError("there is nothing to evaluate: no rows.")
    return found


def rows_of(source: Any) -> Iterator[tuple[Any, str]]:
    """(row, where it stands) of a .jsonl path, several paths, or rows."""
    if isinstance(source, str | os.PathLike):
        yield from _file_rows(Path(source))
    elif isinstance(source, Iterable) and not isinstance(source, Mapping):
        for number, row in enumerate(source, 1):
            if isinstance(row, str | os.PathLike):
                yield from _file_rows(Path(row))
            else:
                yield row, f"row {number}"
    else:
        raise FormatError(f"data: a path or a sequence of rows is wanted, not {type(source)}.")


def _file_rows(path: Path) -> Iterator[tuple[Any, str]]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line), f"{path}:{number}"
            except json.JSONDecodeError as error:
                raise FormatError(f"{path}:{number}: malformed JSON ({error.msg}).") from None


def _question(row: Any, origin: str) -> Question:
    if isinstance(row, Question):
        return row
    if isinstance(row, Example):
        return Question(row, _reference(row))
    if isinstance(row, Mapping) and row.get("choices") is not None:
        return _choice_question(row, origin)
    example = parse_row(row, origin)
    return Question(example, _reference(example), row=row)


def _reference(example: Example) -> str:
    if example.kind == "text":
        return ""
    last = example.chat()[-1]
    if last.role != "assistant":
        raise FormatError(f"{_at(example.origin)}the last turn is no answer (role {last.role!r}).")
    return last.content


def _choice_question(row: Mapping[str, Any], origin: str) -> Question:
    choices = row["choices"]
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) for c in choices)
    ):
        raise FormatError(f"{_at(origin)}choices must be a list of two or more strings.")
    answer: Any = row.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = choices[answer]
    if answer not in choices:
        raise FormatError(
            f"{_at(origin)}answer {answer!r} is none of the choices, nor their index."
        )
    asked = row.get("prompt", row.get("question"))
    if isinstance(row.get("messages"), list):
        turns = [*row["messages"], {"role": "assistant", "content": answer}]
        example = parse_row({**row, "messages": turns}, origin)
    elif isinstance(asked, str):
        example = parse_row({"prompt": asked, "completion": answer}, origin)
    else:
        raise FormatError(f"{_at(origin)}choices need a prompt (a string) or messages before them.")
    return Question(example, answer, tuple(choices), row)


def _at(origin: str) -> str:
    return f"{origin}: " if origin else ""
