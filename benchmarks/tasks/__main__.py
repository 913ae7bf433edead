"""`python -m benchmarks.tasks get [names]`: fetch, check and cache the sources of tasks."""

from __future__ import annotations

import argparse
import sys

from benchmarks.tasks import NAMES, source
from benchmarks.tasks.archive import one_line


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 where a source could not be had (the others are fetched all the same)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    get = commands.add_parser("get", help="fetch what is not in the cache yet")
    get.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all if none")
    names = parser.parse_args(arguments).names or NAMES
    failed = False
    for name in names:
        try:
            module = source(name)
            with one_line(name) as say:
                folder = module.fetch(say)
                say(f"in {folder}" if folder else "nothing to fetch")
        except (RuntimeError, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
