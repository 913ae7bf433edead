"""`plait quickstart`: the whole life of an adapter on a small real task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.cli.common import BASE_HELP, examples


def quickstart(
    output: Annotated[Path, typer.Argument(help="Folder of the run.")] = Path("runs/quickstart"),
    base: Annotated[str, typer.Option(help=BASE_HELP)] = "smollm2-135m",
) -> None:
    """Train adapters on small real tasks, merge, evaluate and export them, and write a report.

    Minutes on a CPU; interrupted, the same command goes on.
    """
    from plait.quickstart.run import main

    main(output, base=base)


def add(app: typer.Typer) -> None:
    app.command(
        short_help="The whole life of an adapter, in minutes.",
        epilog=examples("plait quickstart", "plait quickstart runs/second"),
    )(quickstart)
