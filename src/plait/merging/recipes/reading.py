"""A recipe from its file: safe YAML, checked, with errors that name the line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from plait.errors import PlaitError
from plait.merging.recipes.checking import MisnamedError, check_names, dialect_of
from plait.merging.recipes.schema import Recipe

Trail = tuple[str | int, ...]
LARGEST = 1 << 20
NODES = 100_000
"""Aliases of aliases can make a small file as large as they like."""


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a YAML file; PlaitError names the file, the line and the nearest valid key."""
    return parse_recipe(read_text(Path(path)), str(path))


def read_text(file: Path) -> str:
    """A recipe's text; PlaitError where there is none."""
    if not file.is_file():
        raise PlaitError(f"recipe {file}: there is no such file.")
    if file.stat().st_size > LARGEST:
        raise PlaitError(f"recipe {file}: larger than a megabyte; this is no recipe.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PlaitError(f"recipe {file}: not a text file.") from None


def parse_recipe(text: str, where: str = "recipe") -> Recipe:
    """A recipe from YAML; `where` names it in errors."""
    values, lines = _loaded(text, where)
    if not isinstance(values, dict):
        raise PlaitError(f"{where}: lines of `key: value` are wanted at the top.")
    try:
        recipe = Recipe.model_validate(values)
        check_names(recipe, dialect_of(recipe, recipe.space))
    except ValidationError as error:
        raise PlaitError(_sentence(error.errors()[0], lines, where)) from None
    except MisnamedError as error:
        raise PlaitError(_at(error.trail, lines, where) + str(error)) from None
    return recipe


def _loaded(text: str, where: str) -> tuple[Any, dict[Trail, int]]:
    """What the YAML holds, and the line of every key and item."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[Trail, int] = {(): 1}
        _note_lines(node, (), lines, where)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise PlaitError(f"{where}{line}: not readable as plain YAML ({error.problem}).") from None
    except PlaitError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise PlaitError(f"{where}: not readable as plain YAML ({reason}).") from None
    finally:
        loader.dispose()


def _note_lines(node: Any, trail: Trail, lines: dict[Trail, int], where: str) -> None:
    if len(lines) > NODES:
        raise PlaitError(f"{where}: more than {NODES} values; this is no recipe.")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = str(key.value)
            line = key.start_mark.line + 1
            if (*trail, name) in lines and not isinstance(key, yaml.CollectionNode):
                raise PlaitError(f"{where}, line {line}: {name!r} stands here twice.")
            lines[(*trail, name)] = line
            _note_lines(value, (*trail, name), lines, where)
    elif isinstance(node, yaml.SequenceNode):
        for place, value in enumerate(node.value):
            lines[(*trail, place)] = value.start_mark.line + 1
            _note_lines(value, (*trail, place), lines, where)


def _sentence(error: Any, lines: dict[Trail, int], where: str) -> str:
    at: Sequence[str | int] = error.get("ctx", {}).get("at", ())
    trail = tuple(str(p) if isinstance(p, str) else p for p in (*error["loc"], *at))
    message = error["msg"].rstrip(".?") + ("?" if error["msg"].endswith("?") else ".")
    if error["type"] == "missing":
        message, trail = f"{trail[-1]} is missing.", trail[:-1]
    return _at(trail, lines, where) + message


def _at(trail: Trail, lines: dict[Trail, int], where: str) -> str:
    """The file, the line and the field, as an error begins."""
    known = trail
    while known not in lines:
        known = known[:-1]
    named = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in trail).lstrip(".")
    place = f" ({named})" if named else ""
    return f"{where}, line {lines[known]}{place}: "
