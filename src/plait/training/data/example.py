"""One training example, whatever form its row had.

Accepted rows, told apart by their keys (other keys are ignored):

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}               both strings, or both lists of messages
    {"text": "..."}
    {"instruction": "...", "input": "...", "output": "..."}              alpaca; input is optional
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from plait.errors import FormatError

FORMS = (
    "messages (a list of role/content)",
    "prompt + completion",
    "text",
    "instruction + output (+ input)",
    "conversations (a list of from/value)",
)
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Message:
    """One turn. `train` says whether the loss covers it; `extra` holds keys for the chat template
    (tool_calls, name, ...)."""

    role: str
    content: str
    train: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class Example:
    """A normalised row.

    `kind` says what is filled: "chat" (`messages`), "completion" (`prompt` and `completion`; they
    become a user and an assistant turn unless the template is switched off), "text" (`text`).
    `origin` is "file:line", for messages to the user.
    """

    kind: Literal["chat", "completion", "text"]
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    text: str = ""
    tools: tuple[Any, ...] = ()
    origin: str = ""

    def chat(self) -> tuple[Message, ...]:
        """The turns of a chat or completion example."""
        if self.kind == "completion":
            return (Message("user", self.prompt), Message("assistant", self.completion, train=True))
        return self.messages


def parse_row(row: Any, origin: str = "") -> Example:
    """The example in `row`; FormatError, beginning with `origin`, when it has none of the forms."""
    if not isinstance(row, Mapping):
        raise FormatError(f"{_at(origin)}a row is a JSON object, this one is {_kind(row)}")
    present = {key for key, value in row.items() if value is not None}
    for keys, parse in PARSERS:
        if present.issuperset(keys):
            return parse(row, origin)
    names = ", ".join(map(str, list(row)[:8])) or "none"
    raise FormatError(
        f"{_at(origin)}no known form of row (its keys: {names}); accepted are: {'; '.join(FORMS)}"
    )


def _messages_row(row: Mapping[str, Any], origin: str) -> Example:
    messages = _turns(row, "messages", origin, trained=True)
    return _chat(messages, row, origin)


def _completion_row(row: Mapping[str, Any], origin: str) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Example("completion", prompt=prompt, completion=completion, origin=origin)
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = _turns(row, "prompt", origin, trained=False)
        return _chat(turns + _turns(row, "completion", origin, trained=True), row, origin)
    raise FormatError(
        f"{_at(origin)}prompt and completion must both be strings or both lists of messages, "
        f"they are {_kind(prompt)} and {_kind(completion)}"
    )


def _text_row(row: Mapping[str, Any], origin: str) -> Example:
    text = _string(row["text"], "text", origin)
    if not text.strip():
        raise FormatError(f"{_at(origin)}text is empty; remove the row")
    return Example("text", text=text, origin=origin)


def _alpaca_row(row: Mapping[str, Any], origin: str) -> Example:
    parts = [_string(row.get(key) or "", key, origin) for key in ("instruction", "input")]
    output = _string(row["output"], "output", origin)
    prompt = "\n\n".join(part for part in parts if part.strip())
    return Example("completion", prompt=prompt, completion=output, origin=origin)


def _sharegpt_row(row: Mapping[str, Any], origin: str) -> Example:
    turns = []
    for number, turn in enumerate(_list(row, "conversations", origin), 1):
        place = f"conversations[{number}]"
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise FormatError(f"{_at(origin)}{place} must be an object with from and value")
        role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise FormatError(f"{_at(origin)}{place}: from is {turn['from']!r}, not one of {known}")
        content = _string(turn["value"], f"{place}.value", origin)
        turns.append(Message(role, content, train=role == "assistant"))
    return _chat(turns, row, origin)


PARSERS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any], str], Example]], ...] = (
    (("messages",), _messages_row),
    (("conversations",), _sharegpt_row),
    (("prompt", "completion"), _completion_row),
    (("instruction", "output"), _alpaca_row),
    (("text",), _text_row),
)


def _turns(row: Mapping[str, Any], key: str, origin: str, trained: bool) -> list[Message]:
    turns = []
    for number, turn in enumerate(_list(row, key, origin), 1):
        place = f"{key}[{number}]"
        if not isinstance(turn, Mapping) or "role" not in turn:
            raise FormatError(f"{_at(origin)}{place} must be an object with role and content")
        role = turn["role"]
        if role not in ROLES:
            raise FormatError(
                f"{_at(origin)}{place}: role is {role!r}, not one of {', '.join(ROLES)}"
            )
        extra = {k: v for k, v in turn.items() if k not in ("role", "content", "weight")}
        content = _content(turn.get("content"), f"{place}.content", origin, bool(extra))
        train = trained and role == "assistant" and turn.get("weight", 1) != 0
        turns.append(Message(role, content, train, extra))
    return turns


def _content(value: Any, place: str, origin: str, optional: bool) -> str:
    if value is None and optional:  # a turn that only calls tools
        return ""
    if isinstance(value, list):
        parts = [p.get("text") if isinstance(p, Mapping) else None for p in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
        raise FormatError(f"{_at(origin)}{place} has a part that is not text; only text is read")
    return _string(value, place, origin)


def _chat(messages: list[Message], row: Mapping[str, Any], origin: str) -> Example:
    if not any(message.train for message in messages):
        raise FormatError(f"{_at(origin)}there is no assistant message to train on")
    tools = row.get("tools") or ()
    return Example("chat", messages=tuple(messages), tools=tuple(tools), origin=origin)


def _list(row: Mapping[str, Any], key: str, origin: str) -> list[Any]:
    value = row[key]
    if not isinstance(value, list) or not value:
        raise FormatError(f"{_at(origin)}{key} must be a list with entries, it is {_kind(value)}")
    return value


def _string(value: Any, place: str, origin: str) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{_at(origin)}{place} must be a string, it is {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if value == []:
        return "an empty list"
    names = {"str": "a string", "list": "a list", "dict": "an object", "bool": "true or false"}
    return names.get(type(value).__name__, "a number")


def _at(origin: str) -> str:
    return f"{origin}: " if origin else ""
