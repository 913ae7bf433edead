"""What a user sees when something goes wrong: one line, cause and remedy, a fitting exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from plait.cli import methods
from plait.cli.failure import explain
from plait.errors import PlaitError


def plait(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "plait.cli.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


def test_a_mistake_is_one_line_without_traceback(tmp_path: Path) -> None:
    done = plait("inspect", tmp_path / "nothing")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "nothing" in done.stderr and "Traceback" not in done.stderr


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path: Path) -> None:
    done = plait("inspect", tmp_path / "nothing", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "FormatError" in done.stderr


@pytest.mark.parametrize(
    "words, expected",
    [
        (["mehtods"], "Did you mean 'methods'?"),
        (["merge"], "Missing argument"),
        (["merge", "a", "b"], "Missing option '--out'"),
        (["methods", "lroa"], "did you mean 'lora'?"),
        (["methods", "--axis", "colour"], "there are: "),
        (["merge", "a", "b", "-o", "c", "--rank", "x"], "--rank"),
        (["merge", "a", "b", "-o", "c", "--weights", "1;2"], "numbers joined by commas"),
        (["show", "smolm2-135m"], "did you mean 'smollm2-135m'?"),
        (["eval", "--data", "no.jsonl"], "no.jsonl: there is no such file"),
    ],
)
def test_user_errors(run, words: list[str], expected: str) -> None:
    code, out, err = run(*words)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert expected in err


def test_unforeseen_failures_exit_with_1_and_a_hint(run, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr("plait.cli.methods_table.rows", broken)
    code, _, err = run("methods")
    assert code == 1
    assert err == "error: ZeroDivisionError: oh no; run again with --debug for the traceback.\n"


def test_what_each_kind_of_error_says() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "out/adapter.safetensors")
    assert explain(full) == (
        "out/adapter.safetensors: the disk is full; free some space or write elsewhere.",
        2,
    )
    denied = PermissionError(errno.EACCES, "Permission denied", "/root/x")
    assert explain(denied)[0].startswith("/root/x: permission denied")
    assert explain(OSError("first line\nsecond line")) == ("first line", 2)
    missing = ModuleNotFoundError("No module named 'matplotlib.figure'", name="matplotlib.figure")
    assert explain(missing) == ("this needs matplotlib; run `pip install 'plait[plots]'`.", 2)
    assert explain(ModuleNotFoundError("No module named 'x'", name="x"))[1] == 1
    assert explain(PlaitError("a\n b")) == ("a b", 2)
    assert explain(MemoryError())[1] == 2


def test_version_and_help_import_nothing_heavy() -> None:
    code = (
        "import sys; from plait.cli.main import main; code = main(['--help']);"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules);"
        "print(heavy, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "quickstart" in done.stdout
    assert done.stderr == "set()\n"
    assert plait("--version").stdout.startswith("plait ")


def _hear_interrupts() -> None:
    # A suite started in the background inherits SIGINT ignored, and so would the command.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_exits_with_130(base: Path) -> None:
    command = [sys.executable, "-m", "plait.cli.main", "chat", "--base", str(base)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(  # type: ignore[call-overload]
        command, text=True, preexec_fn=_hear_interrupts, **pipes
    ) as process:
        assert "active: base" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m plait.cli.main methods lora | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("lora (") and done.stderr == ""


def test_every_command_teaches_by_example(run) -> None:
    from plait.cli.main import app

    names = [c.name or c.callback.__name__ for c in app.registered_commands]
    names += [g.name for g in app.registered_groups]
    assert {"methods", "merge", "eval", "chat", "train", "bases"} <= set(names)
    for name in names:
        code, out, _ = run(name, "--help")
        assert code == 0 and f"  plait {name}" in out.partition("Examples:")[2], name
    assert methods.methods.__doc__
