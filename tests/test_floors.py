"""The house keeps its floors: a room imports only from rooms below, and names no single method."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import plait
from plait.adapter.registry import ROOMS

ROOT = Path(plait.__file__).parent

FLOORS: dict[str, float] = {
    "errors": 0,
    "linalg": 1,
    "kernels": 1,
    "adapter": 2,
    "quantization": 3,
    "statistics": 3,
    "structure": 3.5,
    "methods": 4.0,
    "initializers": 4.1,
    "rules": 4.2,
    "routers": 4.2,
    "merging": 5,
    "compression": 5,
    "training": 6,
    "evaluation": 6,
    "library": 6,
    "study": 7,
    "transfer": 7,
    "diffusion": 7,
    "federated": 7,
    "serving": 7,
    "quickstart": 7,
    "testing": 7,
    "cli": 8,
    "web": 8,
}
"""Rooms of one number do not import each other, but for the pairs below."""

NEIGHBOURS = {
    ("statistics", "quantization"),
    ("compression", "merging"),
    ("evaluation", "training"),
    ("library", "training"),
}
"""(a, b) of one floor where a may import b, because b never needs a."""

FILES = sorted(p for p in ROOT.rglob("*.py") if "__pycache__" not in p.parts)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in FILES}


def room(module: str) -> str | None:
    """`plait.adapter.site` lies in `adapter`; `plait` itself, the front door, in no room."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(path: Path, *, at_import_time: bool = False) -> Iterator[tuple[str, int]]:
    """(module of plait, line) for every import; without those in functions where asked."""
    package = ".".join(path.relative_to(ROOT.parent).parts[:-1]) if ROOT in path.parents else ""
    for node in _nodes(ast.parse(path.read_text()), at_import_time):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = _from(node, package)
        else:
            continue
        yield from ((n, node.lineno) for n in names if n == "plait" or n.startswith("plait."))


def _nodes(tree: ast.AST, at_import_time: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if at_import_time and (function or _is_type_checking(child)):
            continue
        yield child
        yield from _nodes(child, at_import_time)


def uses_of_front_door(path: Path) -> set[str]:
    """The x of every `plait.x` in a file."""
    attributes = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute))
    return {n.attr for n in attributes if ast.unparse(n.value) == "plait"}


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _from(node: ast.ImportFrom, package: str) -> list[str]:
    base = node.module or ""
    if node.level:
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*above, base] if base else above)
    # `from plait.adapter import site` imports a module; `from plait.adapter import Site` does not.
    # (`from plait import __version__` is a fact, no dependency.)
    full = [f"{base}.{a.name}" for a in node.names if a.name != "__version__"]
    return [f if f in MODULES else base for f in full]


@pytest.mark.parametrize("path", FILES, ids=[module_name(p) for p in FILES])
def test_a_room_imports_only_from_lower_floors(path: Path) -> None:
    here = room(module_name(path))
    if here is None:
        return  # plait/__init__.py only forwards names, when they are used
    assert here in FLOORS, f"give the room {here!r} a floor in this test and in the architecture"
    for module, line in imports(path):
        there = room(module)
        where = f"{path.relative_to(ROOT)}:{line}"
        if there is None:
            fine = FLOORS[here] >= 7 or uses_of_front_door(path) <= {"__version__"}
            assert fine, f"{where} imports `plait` itself; import the room it needs"
        elif there != here:
            below = FLOORS.get(there, 99) < FLOORS[here] or (here, there) in NEIGHBOURS
            assert below, f"{where}: {here} may not import {there}, which lies no floor below it"


def test_no_import_cycles() -> None:
    """Among imports made when a module loads (a function's own import cannot close a cycle)."""
    graph = {
        name: {m for m, _ in imports(path, at_import_time=True) if m in MODULES and m != name}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "import cycle: " + " -> ".join(
            [*trail[trail.index(name) :], name]
        )
        if name in done:
            return
        for other in sorted(graph[name]):
            visit(other, (*trail, name))
        done.add(name)

    for name in sorted(graph):
        visit(name, ())


METHOD_MODULES = {
    m.rpartition(".")[2]: m
    for m in MODULES
    if room(m) in ROOMS and m.count(".") == 2 and not m.rpartition(".")[2].startswith("_")
}
ALLOWED = {
    "testing/function.py": {"lora"},  # the kit checks what any method was exported to
}
COMMON_CURRENCY = "lora"
"""Exports and merges are plain LoRAs, so any room may make one; none may branch on it."""


def named_methods(path: Path) -> set[str]:
    """Methods whose module a file imports, or whose name stands in a comparison or look-up."""
    tree = ast.parse(path.read_text())
    found = {m.rpartition(".")[2] for m, _ in imports(path) if m in METHOD_MODULES.values()}
    for node in ast.walk(tree):
        inside: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            inside = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and _callee(node) in ("get_method", "import_module"):
            inside = [a for a in node.args if COMMON_CURRENCY not in _strings(a)]
        elif isinstance(node, ast.MatchValue):
            inside = [node.value]
        for expression in inside:
            found |= {_as_method(t) for t in _strings(expression)} & set(METHOD_MODULES)
    return found


def _callee(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _strings(expression: ast.expr) -> Iterator[str]:
    for node in ast.walk(expression):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _as_method(text: str) -> str:
    """The module that a method's name stands for (PEFT's constants, "LORA", are no names)."""
    return text.rpartition(".")[2].replace("-", "_")


SHARED = [p for p in FILES if room(module_name(p)) not in (None, *ROOMS)]


@pytest.mark.parametrize("path", SHARED, ids=[module_name(p) for p in SHARED])
def test_shared_code_has_no_branch_for_one_method(path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    extra = named_methods(path) - allowed
    assert not extra, f"{path.name} names {sorted(extra)}: ask a trait of the delta instead"


BRANCHES = [
    "def f(m):\n    return m.name == 'lora'\n",
    "def f(m):\n    return m in ('dense', 'lora')\n",
    "def f(m):\n    match m:\n        case 'lora':\n            return 1\n",
    "def f():\n    from plait.methods.lora import METHOD\n    return METHOD\n",
    "import plait.methods.lora\n",
]


@pytest.mark.parametrize("text", BRANCHES)
def test_a_branch_for_one_method_is_seen(text: str, tmp_path: Path) -> None:
    source = tmp_path / "shared.py"
    source.write_text(text)
    assert named_methods(source) == {"lora"}


def test_a_word_in_passing_and_making_a_lora_are_no_branch(tmp_path: Path) -> None:
    source = tmp_path / "shared.py"
    source.write_text("# lora\nlora = 'lora'\nmade = get_method('lora')\n")
    assert named_methods(source) == set()


def test_relative_and_lazy_imports_are_seen() -> None:
    lazy = ROOT / "adapter" / "adapter.py"
    assert "plait.adapter.convert" in {m for m, _ in imports(lazy)}
    assert "plait.adapter.convert" not in {m for m, _ in imports(lazy, at_import_time=True)}
    relative = ast.parse("from ..errors import PlaitError").body[0]
    assert isinstance(relative, ast.ImportFrom)
    assert _from(relative, "plait.adapter") == ["plait.errors"]
