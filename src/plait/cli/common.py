"""What several commands share: the console, base models and adapters from the command line."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from plait.errors import PlaitError

if TYPE_CHECKING:
    from rich.console import Console

    from plait.adapter import Adapter

BASE_HELP = "Base model: a name from `plait bases`, a local folder, or a hub id."


def console() -> Console:
    """For results, on stdout; plain and unwrapped where it is no terminal."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() else 1000
    return Console(highlight=False, markup=False, emoji=False, width=wide)


def print_table(table: Any) -> None:
    """A rich table; in a pipe without borders."""
    if not sys.stdout.isatty():
        table.box = None
        table.pad_edge = False
    if table.title:  # as a line above: rich wraps a title to the table's width
        print(table.title)
        table.title = None
    console().print(table)


def note(text: str) -> None:
    """Something to know that is no result, on stderr."""
    print(text, file=sys.stderr, flush=True)


def can_draw(name: str) -> bool:
    """Whether matplotlib is installed; a note says which picture is missing without it."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    note(f"no {name}: this needs matplotlib; run `pip install 'plait[plots]'`")
    return False


def on_terminal() -> bool:
    """Whether progress can be shown."""
    return sys.stderr.isatty()


def open_base(name: str, dtype: str = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) of a base, without the loader's chatter."""
    from plait.training.bases import load_base

    with quiet():
        return load_base(name, dtype=dtype)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' warnings and progress bars off, within."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def parse_mix(text: str) -> dict[str, float]:
    """`a=1.0,b=.5` as {a: 1.0, b: 0.5}; a weight that is left out is 1."""
    mix: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, weight = part.rpartition("=")
        if not equals:
            name, weight = part, "1"
        try:
            mix[name] = float(weight)
        except ValueError:
            raise PlaitError(
                f"adapter {part!r}: {weight!r} is no weight; write PATH=WEIGHT, as in sql=0.5."
            ) from None
    if not mix:
        raise PlaitError("no adapter named; write PATH or PATH=WEIGHT, several joined by commas.")
    return mix


class Shelf:
    """The adapters that a model has loaded, by the path they were asked for with."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.names: dict[str, str] = {}

    def name(self, asked: str) -> str:
        """The name on the model of an adapter given by path (loaded now) or by its name."""
        import plait

        if asked in plait.adapters(self.model) and not Path(asked).exists():
            return asked
        if asked not in self.names:
            self.names[asked] = self._load(asked).name
        return self.names[asked]

    def mix(self, text: str) -> dict[str, float]:
        """{name: weight} of a mix such as `out/sql=1.0,out/french=.5`."""
        return {self.name(asked): weight for asked, weight in parse_mix(text).items()}

    def _load(self, path: str) -> Adapter:
        import plait
        from plait.adapter.formats import read_adapter

        known = plait.adapters(self.model)
        try:
            name = read_adapter(path, model=self.model).name
        except PlaitError as error:
            loaded = f" Loaded: {', '.join(known)}." if known else ""
            raise PlaitError(f"{error}{loaded}") from None
        free = name if name not in known else f"{name}-{len(known)}"
        return plait.load(self.model, path, free, activate=False)


def open_base_for(
    adapters: Sequence[str], base: str | None, dtype: str = "auto"
) -> tuple[Any, Any]:
    """The base that was named, or the one that the first adapter says it was trained on."""
    return open_base(base if base is not None else base_of(adapters), dtype)


def base_of(adapters: Sequence[str]) -> str:
    """The name of the base in the adapters' files; PlaitError when none says it."""
    from plait.adapter.formats import read_adapter

    for path in adapters:
        if name := read_adapter(path).info.get("base"):
            return str(name)
    raise PlaitError("which base model? Name one with --base (see `plait bases`).")


def read_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` words as a dict, the values read as YAML (numbers, lists, true)."""
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise PlaitError(f"{pair!r} is no setting; write key=value, as in rank=32.")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise PlaitError(f"{pair!r}: {value!r} is no YAML value; quote it.") from None
    return found


def examples(*lines: str) -> str:
    """The epilog of a command's help: real commands, kept line by line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def finish(code: int) -> None:
    """End the command with this exit code."""
    raise typer.Exit(code)
