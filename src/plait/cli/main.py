"""`plait`: the entry point, its global options, and what a failure looks like.

Exit codes: 0 done, 1 an unforeseen failure, 2 something the user can put right, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

# Idle OpenMP threads that spin starve whatever else runs: beside one other busy process two threads
# took seven times longer to train. Threads that sleep at once wake late for the next of thousands
# of small products: a fifth of a training step. So GNU's runtime spins for some microseconds first.
# Read when torch is loaded, hence before it; a user's own settings win.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import plait
from plait.cli import (
    bases,
    chat,
    compare,
    compress,
    convert,
    env,
    evaluate,
    extract,
    inspect,
    merge,
    methods,
    prune,
    quickstart,
    search,
    show,
    train,
)
from plait.cli.allocator import keep_freed_memory
from plait.cli.failure import explain

keep_freed_memory()

app = typer.Typer(
    name="plait",
    help="Low-rank adapters (LoRA and kin): train, inspect, convert, merge, evaluate, talk.",
    epilog="""\b
Examples:
  plait quickstart                          the whole life of an adapter in a few minutes
  plait methods                             what there is, one line each
  plait train recipe.yaml rank=32           train; every key of the recipe can be given
  plait chat --base smollm2-135m --adapter out/sql

`plait COMMAND --help` shows examples for each command.""",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: quick, and the same in a pipe
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for module in (
    quickstart,
    methods,
    show,
    train,
    compare,
    evaluate,
    chat,
    inspect,
    merge,
    search,
    extract,
    compress,
    prune,
    convert,
    bases,
    env,
):
    module.add(app)


def _version(shown: bool) -> None:
    if shown:
        print(f"plait {plait.__version__}")
        raise typer.Exit()


@app.callback()
def _global(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `--debug` is understood anywhere on the line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or bool(os.environ.get("PLAIT_DEBUG"))
    given = [a for a in given if a != "--debug"]
    try:
        return _code(app(args=given, prog_name="plait", standalone_mode=False))
    except BrokenPipeError:  # `plait methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        line, code = explain(error)
        print(f"error: {line}", file=sys.stderr)
        return code


def _code(result: Any) -> int:
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
