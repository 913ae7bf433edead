"""Showing samples with their loss mask, to see a wrong template before it costs a night."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from plait.training.data.encode import IGNORE, Encoded


def show_examples(
    examples: Sequence[Encoded], tokenizer: Any, count: int = 2, console: Any = None
) -> None:
    """Prints the first `count` examples through the tokenizer, what is not trained on dimmed.

    `console` is a `rich.console.Console`, by default one on stdout.
    """
    from rich.console import Console
    from rich.rule import Rule

    console = console or Console(highlight=False)
    for number in range(min(count, len(examples))):
        item = examples[number]
        title = f"example {number + 1}: {len(item)} tokens, {item.trained} trained (not dimmed)"
        console.print(Rule(title, align="left"))
        console.print(render(item, tokenizer))


def render(item: Encoded, tokenizer: Any) -> Any:
    """One example as a rich Text: the trained spans bold green, the rest dim."""
    from rich.text import Text

    text = Text()
    pairs = zip(item.input_ids, item.labels, strict=True)
    # Runs are decoded together: one token may hold only part of a character.
    for masked, run in groupby(pairs, key=lambda pair: pair[1] == IGNORE):
        ids = [token for token, _ in run]
        text.append(tokenizer.decode(ids), style="dim" if masked else "bold green")
    return text
