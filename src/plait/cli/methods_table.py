"""What `plait methods` prints, as plain data: rows of all methods, and one method in full."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from plait.adapter import Method, Site, get_method, method_names
from plait.cli.common import note
from plait.errors import PlaitError
from plait.merging import get_merge_method, merge_method_names
from plait.merging.aliases import ALIASES
from plait.merging.search import WANTS, get_search_method, make_search, search_method_names


def rows(axis: str | None = None, base: str | None = None) -> list[dict[str, Any]]:
    """One row a method: name, axis, title, paper, and with `base` its trainable parameters."""
    found = _loadable(method_names())
    if axis is not None:
        axes = sorted({m.axis for m in found})
        found = [m for m in found if m.axis.startswith(axis)]
        if not found:
            raise PlaitError(f"no axis begins with {axis!r}; there are: {', '.join(axes)}.")
    model = None if base is None else _skeleton(base)
    table = []
    for m in sorted(found, key=lambda m: (m.axis, m.name)):
        row: dict[str, Any] = {"name": m.name, "axis": m.axis, "title": m.title, "paper": m.paper}
        if model is not None:
            count = trainable(m, model)
            row["trainable"] = "" if count is None else count
        table.append(row)
    return table


def _loadable(names: Sequence[str]) -> list[Method]:
    """Their methods; one of somebody else's that does not load must not hide the others."""
    found = []
    for name in names:
        try:
            found.append(get_method(name))
        except Exception as error:
            note(f"method {name!r} cannot be loaded: {' '.join(str(error).split())}")
    return found


def merge_rows() -> list[dict[str, Any]]:
    """One row a merge method, and one for every further name that stands for one."""
    found = [get_merge_method(name) for name in merge_method_names()]
    table = [{"name": m.name, "title": m.title, "paper": m.paper} for m in found]
    for name, (meant, options) in ALIASES.items():
        settings = ", ".join(f"{key}={_yaml(value)}" for key, value in options.items())
        title = f"Another name of {meant}" + (f", with {settings}" if settings else "")
        table.append({"name": name, "title": title, "paper": get_merge_method(name).paper})
    return sorted(table, key=lambda row: row["name"])


def search_rows() -> list[dict[str, Any]]:
    """One row a method that searches a merge's coefficients with data, and what data it wants."""
    found = []
    for name in search_method_names():
        method = get_search_method(name)
        wants = WANTS[make_search(method, {}).wants]
        found.append(
            {"name": name, "searches with": wants, "title": method.title, "paper": method.paper}
        )
    return found


def all_merge_rows() -> list[dict[str, Any]]:
    """Both, with a column that is empty for merges without data."""
    plain = [{"name": r["name"], "searches with": "", **r} for r in merge_rows()]
    return plain + search_rows()


def _skeleton(base: str) -> Any:
    from plait.cli.skeleton import skeleton

    return skeleton(base)


def trainable(method: Method, model: Any, options: Any = None) -> int | None:
    """What the method trains on `model` by its formula, with the paper's defaults."""
    from plait.adapter import find_sites

    if method.count is None or method.delta is None:
        return None
    try:
        chosen = method.options() if options is None else options
        if method.choose is not None:
            sites: Sequence[Site] = [site for site, _ in method.choose(model, chosen)]
        else:
            sites = find_sites(model, method.targets, kinds=method.kinds)
        return method.count(sites, chosen)
    except PlaitError:  # the method has no place in this model
        return None


def describe(name: str, base: str | None = None) -> dict[str, Any]:
    """One method in full."""
    method = get_method(name)
    facts: dict[str, Any] = {
        "name": method.name,
        "axis": method.axis,
        "title": method.title,
        "paper": method.paper,
        "description": _docstring(_home(method)),
        "options": option_rows(_options_class(method)),
        "example": _example(method),
    }
    if base is not None:
        facts["trainable"] = {base: trainable(method, _skeleton(base))}
    return facts


def describe_merge(name: str) -> dict[str, Any]:
    """One merge method in full, or one that searches with data."""
    key = name.lower().replace("_", "-")
    if key in search_method_names() and key not in merge_method_names():
        return _describe_search(key)
    method = get_merge_method(name)
    return {
        "name": method.name,
        "axis": "merge",
        "title": method.title,
        "paper": method.paper,
        "description": _docstring(method.merge),
        "options": [
            {**row, "default": method.options.get(row["name"], row["default"])}
            for row in option_rows(method.merge)
        ],
        "example": f"plait merge out/a out/b --method {method.name} -o out/merged",
    }


def _describe_search(name: str) -> dict[str, Any]:
    method = get_search_method(name)
    wants = make_search(method, {}).wants
    data = "--data sql=a.jsonl --data chat=b.jsonl" if wants != "loss" else "--data few.jsonl"
    return {
        "name": method.name,
        "axis": f"merge, searched with {WANTS[wants]}",
        "title": method.title,
        "paper": method.paper,
        "description": _docstring(method.search),
        "options": option_rows(method.search),
        "example": f"plait search out/sql out/chat -m {method.name} {data} -o out/searched",
    }


def _home(method: Method) -> Any:
    """Something that is defined in the method's file."""
    return method.delta or method.initializer or method.rule or method.options


def _docstring(thing: Any) -> str:
    module = sys.modules.get(getattr(thing, "__module__", ""))
    return textwrap.dedent((module and module.__doc__) or "").strip()


def _options_class(method: Method) -> Any:
    """Initialisers and rules are dataclasses themselves: their fields are the options."""
    if method.delta is None:
        for piece in (method.initializer, method.rule):
            if piece is not None and dataclasses.is_dataclass(piece):
                return piece
    return method.options


def _example(method: Method) -> str:
    if method.axis == "rule":
        return f"plait train recipe.yaml rules=[{method.name}]"
    if method.axis == "initialisation" and method.delta is None:
        return f"plait train recipe.yaml initializer={method.name}"
    return f"plait train recipe.yaml method={method.name}"


def option_rows(cls: Any) -> list[dict[str, Any]]:
    """{name, type, default, meaning} of a dataclass's fields; the meaning stands under it."""
    meanings = _field_docstrings(cls)
    found = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        found.append(
            {
                "name": field.name,
                "type": field.type if isinstance(field.type, str) else str(field.type),
                "default": _default(field),
                "meaning": meanings.get(field.name, ""),
            }
        )
    return found


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "required"


def _field_docstrings(cls: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    owners: list[type] = list(reversed(cls.__mro__))
    for owner in owners:
        if "__dataclass_fields__" not in vars(owner):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError, SyntaxError):  # made at run time: there is no source
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for statement, below in pairwise(body):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(below, ast.Expr):
                continue
            if isinstance(statement.target, ast.Name) and isinstance(below.value, ast.Constant):
                found[statement.target.id] = " ".join(str(below.value.value).split())
    return found


def as_text(facts: dict[str, Any]) -> str:
    """A method in full, for reading."""
    lines = [f"{facts['name']} ({facts['axis']})", f"{facts['title']}. {facts['paper']}", ""]
    lines += [facts["description"], ""]
    if facts["options"]:
        lines.append("Options:")
    for row in facts["options"]:
        lines.append(f"  {row['name']}={_yaml(row['default'])}  ({row['type']})")
        lines += textwrap.wrap(
            row["meaning"], 92, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    for base, count in facts.get("trainable", {}).items():
        shown = "not applicable" if count is None else f"{count:,} parameters"
        lines += ["", f"Trains on {base} by default: {shown}"]
    return "\n".join([*lines, "", f"Example:  {facts['example']}"])


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
