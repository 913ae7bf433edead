"""`plait eval`: the same questions to adapters and their base, with intervals."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.common import (
    BASE_HELP,
    Shelf,
    examples,
    note,
    on_terminal,
    open_base_for,
    parse_mix,
    print_table,
)


def evaluate(
    data: Annotated[list[str], typer.Option(help="A .jsonl file of rows (repeat for several).")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="PATH, or a mix PATH=1.0,PATH=.5 (repeat: each is asked in turn)."),
    ] = None,
    base: Annotated[str | None, typer.Option(help=f"{BASE_HELP} Else the adapter's own.")] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base/--no-base", help="Also ask the base alone.")
    ] = True,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="exact_match (default), choice, loss; repeat for several."),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="module:function, called as (prediction, row) -> true/false or number."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many rows.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Rows at once.")] = 16,
    template: Annotated[
        bool, typer.Option("--template/--no-template", help="Use the chat template.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="Of the base: auto, float32, bfloat16.")] = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write JSON here.")] = None,
    predictions: Annotated[int, typer.Option(help="Show this many answers of each adapter.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score greedy answers (or the likelihood of given ones) on rows in any training form."""
    from plait.evaluation import evaluate as run
    from plait.evaluation import read_questions

    mixes = adapter or []
    questions = read_questions(data)[:limit]  # a mistake in the data before the model is loaded
    judge = _import_scorer(scorer) if scorer is not None else None
    paths = [path for mix in mixes for path in parse_mix(mix)]
    model, tokenizer = open_base_for(paths, base, dtype)
    shelf = Shelf(model)
    asked: dict[str, Any] = {"base": {}} if with_base or not mixes else {}
    asked |= {mix: shelf.mix(mix) for mix in mixes}
    found = run(
        model,
        tokenizer,
        questions,
        metric or ([] if judge else ["exact_match"]),
        scorer=judge,
        adapters=asked,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        template=template,
        progress=on_terminal(),
    )
    if as_json:
        print(found.to_json())
    else:
        print_table(found.table())
        _show(found, questions, predictions)
    if out is not None:
        note(f"wrote {found.save(out)}")


def _show(found: Any, questions: Any, count: int) -> None:
    for result in found.results:
        for question, text in list(zip(questions, result.predictions, strict=False))[:count]:
            print(json.dumps([result.label, question.answer, text], ensure_ascii=False))


def _import_scorer(spec: str) -> Callable[..., Any]:
    from plait.errors import PlaitError

    module, colon, name = spec.partition(":")
    if not colon:
        raise PlaitError(f"scorer {spec!r}: write module:function, as in my_task:score.")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PlaitError(f"scorer {spec!r}: {error}.") from None


def add(app: typer.Typer) -> None:
    app.command(
        "eval",
        short_help="Score adapters and their base on data.",
        epilog=examples(
            "plait eval --base smollm2-135m --adapter out/sql --data test.jsonl",
            "plait eval --adapter a --adapter b --adapter a=.5,b=.5 --data test.jsonl",
            "plait eval --base smollm2-135m --data quiz.jsonl --metric choice --metric loss",
        ),
    )(evaluate)
