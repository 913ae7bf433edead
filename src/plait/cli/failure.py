"""One line for whatever went wrong, and the exit code that goes with it."""

from __future__ import annotations

import errno
from typing import Any

from plait.errors import PlaitError

USER, BUG = 2, 1

# Modules that an extra of Plait brings along.
EXTRAS = {
    "matplotlib": "plots",
    "trl": "train",
    "datasets": "train",
    "gguf": "demo",
    "hassil": "demo",
    "home_assistant_intents": "demo",
    "reasoning_gym": "demo",
    "peft": "bench",
    "psutil": "bench",
    "scipy": "search",
    "cma": "search",
    "pymoo": "search",
    "optuna": "compare",
    "ray": "ray",
}


def explain(error: BaseException) -> tuple[str, int]:
    """(one line naming cause and remedy, exit code)."""
    if isinstance(error, PlaitError):
        return _one_line(error), USER
    if hasattr(error, "format_message"):  # the option parser's own errors
        return _usage(error), USER
    if isinstance(error, OSError):
        return _os_error(error), USER
    if isinstance(error, ImportError):
        return _import_error(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; try a smaller batch, rank or model.", USER
    kind = type(error).__name__
    return f"{kind}: {_one_line(error)}; run again with --debug for the traceback.", BUG


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "plait"
    message = _one_line(error.format_message()).rstrip(".")
    return f"{message}{'' if message.endswith('?') else '.'} See `{command} --help`."


def _os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename is not None else ""
    if error.errno == errno.ENOSPC:
        return f"{where}the disk is full; free some space or write elsewhere."
    if error.errno == errno.ENOENT and error.filename is not None:
        return f"{where}there is no such file or folder."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{where}permission denied; choose another place or change its permissions."
    if error.errno is not None and error.strerror:
        return f"{where}{error.strerror.lower()}."
    # Without errno it is a library's message, often several paragraphs of it.
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return _one_line(first)


def _import_error(error: ImportError) -> tuple[str, int]:
    name = (error.name or "").partition(".")[0]
    if name in EXTRAS:
        return f"this needs {name}; run `pip install 'plait[{EXTRAS[name]}]'`.", USER
    if error.name is None:  # raised on purpose, with advice in it
        return _one_line(error), USER
    return f"{_one_line(error)}; run again with --debug for the traceback.", BUG


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
