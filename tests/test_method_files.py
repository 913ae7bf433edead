"""The form of a method file: one page that names its paper and ends in its record."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import plait
from plait.adapter.method import Method
from plait.adapter.registry import ROOMS

SHORTEST, LONGEST = 40, 150
SOURCE = Path(plait.__file__).parent
FILES = sorted(
    path for room in ROOMS for path in (SOURCE / room).glob("*.py") if not path.name.startswith("_")
)
PAPER = re.compile(r"arXiv \d{4}\.\d{4,5}|(ACL|AAAI|CVPR|EMNLP|ICCV|ICLR|ICML|NeurIPS|TMLR) \d{4}")

each_file = pytest.mark.parametrize(
    "path", FILES, ids=[f"{path.parent.name}-{path.stem}" for path in FILES]
)


def test_every_room_has_files() -> None:
    assert {path.parent.name for path in FILES} == set(ROOMS)


@each_file
def test_it_fits_on_a_page(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert SHORTEST <= lines <= LONGEST, (
        f"{path.name} has {lines} lines; move an idea of its own into a sibling whose name starts "
        "with an underscore."
    )


@each_file
def test_it_begins_with_a_docstring_that_names_a_paper(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text is not None and PAPER.search(text)


@each_file
def test_it_ends_in_its_record(path: Path) -> None:
    last = ast.parse(path.read_text(encoding="utf-8")).body[-1]
    assert isinstance(last, ast.Assign)
    assert [ast.unparse(target) for target in last.targets] == ["METHOD"]
    method = importlib.import_module(f"plait.{path.parent.name}.{path.stem}").METHOD
    assert isinstance(method, Method)
    assert method.name == path.stem.replace("_", "-")
    assert PAPER.search(method.paper)


def test_files_are_short_on_the_whole() -> None:
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in FILES]
    assert sum(lengths) / len(lengths) <= 120
