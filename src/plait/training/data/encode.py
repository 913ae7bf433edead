"""From an example to token ids and labels, with the loss on the answers only.

    <|im_start|>user ... <|im_end|> <|im_start|>assistant    Paris . <|im_end|>   \\n
    -100                                                     trained              -100

The template is rendered once for the whole conversation and once up to either end of each trained
turn. Those must be prefixes of the whole (checked); their lengths are the spans of characters to
train on, and the tokenizer's offsets carry the spans over to tokens. So a token that joins the end
of the prompt with the first letter of the answer cannot shift the mask. The end-of-turn token is
trained, the white space that a template puts after it is not: at inference nobody generates it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from plait.errors import PlaitError
from plait.training.data.example import Example

IGNORE = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of equal length; a label is the id at its own place or -100 (the model
    shifts). `truncated` tells that `max_length` cut something off."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained(self) -> int:
        """How many tokens the loss covers (the first one of a sequence cannot be predicted)."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass
class EncodedDataset:
    """The encoded examples and what became of the rows."""

    items: list[Encoded]
    rows: int = 0
    truncated: int = 0
    dropped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Encoded:
        return self.items[index]

    @property
    def lengths(self) -> list[int]:
        return [len(item) for item in self.items]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def trained(self) -> int:
        return sum(item.trained for item in self.items)


def encode(
    example: Example,
    tokenizer: Any,
    max_length: int = 2048,
    template: bool = True,
    turns: Literal["all", "last"] = "all",
) -> Encoded:
    """Token ids and labels of one example, cut on the right at `max_length` tokens.

    `template=False` joins prompt and completion as they are and ends them with the end-of-text
    token (chat rows need the template). `turns="last"` trains on the last answer of a conversation
    only. Plain text is trained on throughout and ended likewise. The result may have no trained
    token left after the cut: `encode_all` drops those and says so.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise PlaitError(
            f"{type(tokenizer).__name__} gives no character offsets, which the loss mask needs; "
            "load the model's fast tokenizer"
        )
    if example.kind == "text":
        return _cut(*_tokens(example.text, [(0, len(example.text))], tokenizer), max_length)
    if example.kind == "completion" and not template:
        text = example.prompt + example.completion
        return _cut(*_tokens(text, [(len(example.prompt), len(text))], tokenizer), max_length)
    if not template:
        raise PlaitError(f"{_at(example)}a chat row needs the chat template (template=True)")
    text, spans = _render(example, tokenizer, turns)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoding["input_ids"])
    return _cut(ids, _labels(ids, encoding["offset_mapping"], spans), max_length)


def encode_all(
    examples: Iterable[Example],
    tokenizer: Any,
    max_length: int = 2048,
    template: bool = True,
    turns: Literal["all", "last"] = "all",
) -> EncodedDataset:
    """Every example encoded; long plain texts become several pieces of `max_length`.

    An example of which no trained token is left (its prompt alone fills `max_length`) is dropped.
    One warning tells how many were dropped and how many lost their end. PlaitError when none is
    left.
    """
    data = EncodedDataset([])
    for example in examples:
        data.rows += 1
        length = max_length if example.kind != "text" else 10**9
        item = encode(example, tokenizer, length, template, turns)
        pieces = [item] if example.kind != "text" else _pieces(item, max_length)
        kept = [piece for piece in pieces if piece.trained]
        data.items += kept
        data.truncated += sum(piece.truncated for piece in kept)
        if not kept:
            data.dropped.append(example.origin or f"row {data.rows}")
    if not data.items:
        raise PlaitError(
            f"none of {data.rows} examples has a token to train on within max_length={max_length}; "
            "raise max_length"
        )
    _warn(data, max_length)
    return data


def _warn(data: EncodedDataset, max_length: int) -> None:
    parts = []
    if data.dropped:
        some = ", ".join(data.dropped[:3]) + (", ..." if len(data.dropped) > 3 else "")
        parts.append(f"{len(data.dropped)} were dropped, nothing to train on being left ({some})")
    if data.truncated:
        parts.append(f"{data.truncated} lost their end")
    if parts:
        warnings.warn(
            f"of {data.rows} examples, with max_length={max_length}: {' and '.join(parts)}",
            stacklevel=3,
        )


def _render(
    example: Example, tokenizer: Any, turns: Literal["all", "last"]
) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation as text, and the spans of characters to train on."""
    if not getattr(tokenizer, "chat_template", None):
        raise PlaitError(
            f"{_at(example)}the tokenizer has no chat template; set tokenizer.chat_template, or "
            "use prompt + completion rows with template=False"
        )
    messages = example.chat()
    dicts = [message.as_dict() for message in messages]

    def render(count: int, prompt: bool) -> str:
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt}
        if example.tools:
            options["tools"] = list(example.tools)
        return tokenizer.apply_chat_template(dicts[:count], **options)

    trained = [index for index, message in enumerate(messages) if message.train]
    trained = trained[-1:] if turns == "last" else trained
    whole, spans = render(len(messages), False), []
    for index in trained:
        before, after = render(index, True), render(index + 1, False)
        if not (whole.startswith(before) and whole.startswith(after) and len(before) <= len(after)):
            raise PlaitError(
                f"{_at(example)}the chat template renders turn {index + 1} differently when others "
                "follow, so the trained tokens cannot be told; "
                + ("use turns='last'" if turns == "all" else "use another chat template")
            )
        spans.append((len(before), len(before) + len(whole[len(before) : len(after)].rstrip())))
    return whole, spans


def _tokens(text: str, spans: list[tuple[int, int]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Without a template: the tokenizer's own special tokens, and end-of-text as the end."""
    encoding = tokenizer(text, return_offsets_mapping=True)
    ids = list(encoding["input_ids"])
    labels = _labels(ids, encoding["offset_mapping"], spans)
    end = tokenizer.eos_token_id
    if end is not None:
        if ids and ids[-1] == end:
            labels[-1] = end
        else:
            ids, labels = [*ids, end], [*labels, end]
    return ids, labels


def _labels(
    ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]
) -> list[int]:
    labels = [IGNORE] * len(ids)
    for place, (start, end) in enumerate(offsets):
        if start < end and any(first <= start < last for first, last in spans):
            labels[place] = ids[place]
    return labels


def _cut(ids: list[int], labels: list[int], max_length: int) -> Encoded:
    return Encoded(ids[:max_length], labels[:max_length], truncated=len(ids) > max_length)


def _pieces(item: Encoded, max_length: int) -> list[Encoded]:
    starts = range(0, len(item), max_length)
    return [
        Encoded(item.input_ids[s : s + max_length], item.labels[s : s + max_length]) for s in starts
    ]


def _at(example: Example) -> str:
    return f"{example.origin}: " if example.origin else ""
