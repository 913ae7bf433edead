"""`plait eval`: the same questions to adapters and their base, with intervals."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
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
        typer.Option(
            help="Of written answers exact_match (default), f1, rouge1, rouge2, rougeL, bleu or "
            "chrf; of options choice, classification, calibration; or loss. Repeat for several."
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="module:function, called as (prediction, row) -> true/false or number."),
    ] = None,
    mixed: Annotated[
        bool,
        typer.Option("--mixed", help="Ask all adapters in one pass, row by row in each batch."),
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE.jsonl: another task that must not be forgotten (repeat)."),
    ] = None,
    reasoning: Annotated[
        str | None,
        typer.Option(help="Rows (.jsonl) with steps: does the chain of thought carry the answer?"),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write report.html, report.json and plots to this folder.")
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
    from plait.evaluation.forgetting import forgetting

    mixes = adapter or []
    questions = read_questions(data)[:limit]  # a mistake in the data before the model is loaded
    others = {n: read_questions(file)[:limit] for n, file in _named(keep or ()).items()}
    thoughts = _reasoned(reasoning, limit)
    judge = _import_scorer(scorer) if scorer is not None else None
    paths = [path for mix in mixes for path in parse_mix(mix)]
    model, tokenizer = open_base_for(paths, base, dtype)
    shelf = Shelf(model)
    asked: dict[str, Any] = {"base": {}} if with_base or others or not mixes else {}
    asked |= {mix: shelf.mix(mix) for mix in mixes}
    settings: dict[str, Any] = {
        "adapters": asked,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "template": template,
    }

    def ask(rows: Any) -> Any:
        return run(
            model,
            tokenizer,
            rows,
            metric or ([] if judge else ["exact_match"]),
            scorer=judge,
            mixed=mixed,
            progress=on_terminal(),
            **settings,
        )

    found = ask(questions)
    kept = {name: ask(rows) for name, rows in others.items()}
    changes = forgetting(kept)
    tested = _test_reasoning(model, tokenizer, thoughts, settings) if thoughts else []
    if as_json:
        print(found.to_json())
    else:
        print_table(found.table())
        _show(found, questions, predictions)
        _show_changes(changes)
        _show_reasoning(tested)
    if report is not None:
        from plait.evaluation.eval_page import write_evaluation

        for written in write_evaluation(
            report, found, others=kept, changes=changes, reasoning=tested
        ):
            note(f"wrote {written}")
    if out is not None:
        note(f"wrote {found.save(out)}")


def _show(found: Any, questions: Any, count: int) -> None:
    for result in found.results:
        for question, text in list(zip(questions, result.predictions, strict=False))[:count]:
            print(json.dumps([result.label, question.answer, text], ensure_ascii=False))


def _show_changes(changes: Sequence[Any]) -> None:
    for c in changes:
        gap = f"{c.score.value:+.4f} [{c.score.low:+.4f}, {c.score.high:+.4f}]"
        print(f"{c.task}, {c.label}: {c.metric} {gap}{' FORGOTTEN' if c.worse else ''}")


def _show_reasoning(tested: Sequence[Any]) -> None:
    for each in tested:
        shown = ", ".join(f"{n.replace('_', ' ')} {s.value:.3f}" for n, s in each.scores.items())
        print(f"chain of thought, {each.label}: {shown}")


def _test_reasoning(
    model: Any, tokenizer: Any, rows: list[Any], settings: dict[str, Any]
) -> list[Any]:
    from plait.evaluation.faithfulness import faithfulness

    return faithfulness(model, tokenizer, rows, **settings)


def _reasoned(path: str | None, limit: int | None) -> list[Any]:
    if path is None:
        return []
    from plait.evaluation.faithfulness import read_reasoned

    return read_reasoned(path)[:limit]


def _named(pairs: Sequence[str]) -> dict[str, str]:
    """`name=file` words; a file alone goes by its own name."""
    found = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        found[name if equals else Path(pair).stem] = file if equals else pair
    return found


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
            "plait eval --adapter a --adapter b --mixed --data test.jsonl --metric calibration",
            "plait eval --adapter a --data test.jsonl --keep facts=facts.jsonl --report out/eval",
        ),
    )(evaluate)
