"""`plait bases`: base models that have a short name."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from plait.cli.common import examples, print_table

app = typer.Typer(
    help="List base models with a short name, or get one ready.",
    short_help="Base models with a short name.",
    epilog=examples("plait bases", "plait bases get smollm2-135m"),
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_all()


@app.command("list", epilog=examples("plait bases list", "plait bases list --json"))
def list_all(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the bases: what they are, and whether they are on disk."""
    from rich.table import Table

    from plait.training.bases import list_bases

    rows = [
        {
            "name": b.name,
            "parameters": f"{b.parameters / 1e6:.1f} M",
            "licence": b.licence,
            "on disk": str(b.path) if b.on_disk else f"no ({b.disk_bytes / 1e9:.2f} GB)",
            "title": b.title,
        }
        for b in list_bases()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*row.values())
    print_table(table)


@app.command(epilog=examples("plait bases get smollm2-135m"))
def get(name: Annotated[str, typer.Argument(help="A short name from `plait bases`.")]) -> None:
    """Get a base ready on this disk (once), and print where it lies."""
    from plait.training.bases import get_base

    print(get_base(name))


def add(parent: typer.Typer) -> None:
    parent.add_typer(app, name="bases")
