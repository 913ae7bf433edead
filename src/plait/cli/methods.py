"""`plait methods`: what there is, and one method in full."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from plait.cli.common import BASE_HELP, examples, print_table


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None,
    axis: Annotated[
        str | None, typer.Option(help="Only this axis (a beginning is enough).")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help=f"{BASE_HELP} Counts what each method would train on it by default."),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="List merge methods instead, those that search with data too."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods, or describe one: formula, options with defaults, an example."""
    from plait.cli import methods_table as show

    if name is not None:
        one = show.describe_merge(name) if merge else show.describe(name, base)
        print(json.dumps(one, indent=2, default=str) if as_json else show.as_text(one))
        return
    rows = show.all_merge_rows() if merge else show.rows(axis, base)
    if as_json:
        print(json.dumps(rows, indent=2, default=str))
    else:
        print_table(_table(rows))


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in rows[0] if rows else ():
        table.add_column(column, justify="right" if column == "trainable" else "left")
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
    return table


def add(app: typer.Typer) -> None:
    app.command(
        short_help="All methods, or one in full.",
        epilog=examples(
            "plait methods",
            "plait methods lora-xs",
            "plait methods --base smollm2-135m --axis parameterisation",
            "plait methods --merge",
            "plait methods adamerging --merge",
        ),
    )(methods)
