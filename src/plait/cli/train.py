"""`plait train`: run a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from plait.cli.common import examples


def train(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[RECIPE.yaml] [key=value]...",
            help="A recipe, and keys of it (or a method's options) with other values.",
        ),
    ],
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would train, its size and memory; read no data."),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start anew, removing what the output folder holds.")
    ] = False,
) -> None:
    """Train an adapter; the same command again goes on where it was interrupted.

    A key that does not exist is an error that names the nearest one.
    """
    from plait.errors import PlaitError
    from plait.training.recipe import Recipe

    files, overrides = split_words(words)
    recipe = Recipe.load(files[0], overrides) if files else Recipe.make(None, overrides)
    if dry_run:
        from plait.cli.skeleton import skeleton
        from plait.training.dryrun import dry_run as predict

        found = predict(skeleton(recipe.base), recipe)
        print(found)
        if found.refusals:
            raise PlaitError(found.refusals[0])
        return
    from plait.training.trainer import train as run

    run(recipe, resume=False if restart else "auto")


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """The recipe's path (at most one) and the key=value words."""
    from plait.errors import PlaitError

    overrides = [w for w in words if "=" in w]
    files = [w for w in words if "=" not in w]
    if len(files) > 1:
        raise PlaitError(
            f"two recipes, {files[0]!r} and {files[1]!r}; give one, and the rest as key=value."
        )
    return files, overrides


def add(app: typer.Typer) -> None:
    app.command(
        short_help="Train a recipe, or go on with it.",
        epilog=examples(
            "plait train recipe.yaml",
            "plait train recipe.yaml method=dora rank=32 lr=1e-3 --dry-run",
            "plait train base=smollm2-135m data=train.jsonl rank=8 steps=200 output=out/sql",
        ),
    )(train)
