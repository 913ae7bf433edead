"""Where a checkpoint's tensors stand, read from the text of its model's source.

Importing a model's class takes longer than factoring a small model. Its source says the same in a
few lines, `self.q_proj = nn.Linear(...)`, and is parsed, not run. This is believed only where every
tensor of the checkpoint is accounted for by plain layers; anything else is left to the model.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.adapter import Site
from plait.adapter.site import rebuild_site

KINDS = {"nn.Linear": "linear", "nn.Embedding": "embedding"}
Shapes = Mapping[str, tuple[int, ...]]


class SourcePlaces:
    """As `weights.Places`, for names and shapes whose sites are known already."""

    def __init__(self, sites: dict[str, Site], tied: dict[str, str]) -> None:
        self._tied = tied
        self._sites: dict[object, list[Site]] = {}
        for name, site in sites.items():
            self._sites.setdefault(self.key(name), []).append(site)

    def key(self, name: str) -> object:
        """The same for all names of one tied tensor."""
        return self._tied.get(name, name)

    def sites(self, name: str, shape: tuple[int, ...]) -> list[Site]:
        """Every site that reads this tensor."""
        return self._sites.get(self.key(name), [])


def places_from_source(folder: object, shapes: Shapes) -> SourcePlaces | None:
    """The places of a checkpoint's tensors; None where its model's source does not tell them."""
    if not isinstance(folder, str | os.PathLike) or not (Path(folder) / "config.json").is_file():
        return None
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    tree = _source(config)
    if tree is None:
        return None
    kind = config["architectures"][0]
    model = next((c for c in tree.body if isinstance(c, ast.ClassDef) and c.name == kind), None)
    tied = None if model is None else _tied(model, config, shapes)
    if model is None or tied is None:
        return None
    inside, outside = _assigned(tree), _assigned(model)
    sites = {}
    for name, shape in (
        {**shapes} | {head: shapes[source] for head, source in tied.items()}
    ).items():
        site = _site(name, shape, inside)
        if site is None or name.partition(".")[0] not in outside:
            return None
        sites[name] = site
    return SourcePlaces(sites, tied)


def _source(config: Mapping[str, Any]) -> ast.Module | None:
    kind, found = str(config.get("model_type")), importlib.util.find_spec("transformers")
    special = config.get("auto_map") or config.get("quantization_config")
    if special or not config.get("architectures") or not re.fullmatch(r"\w+", kind):
        return None
    folders = [] if found is None else found.submodule_search_locations or []
    files = (Path(f) / "models" / kind / f"modeling_{kind}.py" for f in folders)
    text = next((f.read_text(encoding="utf-8") for f in files if f.is_file()), None)
    return None if text is None else ast.parse(text)


def _assigned(tree: ast.AST) -> dict[str, set[str]]:
    """{attribute: the classes of what `self.<attribute>` is set to; "" for no plain call}."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                value = node.value  # type: ignore[attr-defined]
                made = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
                found.setdefault(target.attr, set()).add(made)
    return found


def _tied(model: ast.ClassDef, config: Mapping[str, Any], shapes: Shapes) -> dict[str, str] | None:
    """{name of a head: name of the table it reads}; None where that cannot be told."""
    keys: object = {}
    for node in model.body:
        if isinstance(node, ast.Assign) and "_tied_weights_keys" in map(ast.unparse, node.targets):
            try:
                keys = ast.literal_eval(node.value)
            except ValueError:
                return None
    if keys and not isinstance(config.get("tie_word_embeddings"), bool):
        return None
    if not keys or not config["tie_word_embeddings"]:
        return {}
    if not isinstance(keys, dict) or not all(source in shapes for source in keys.values()):
        return None
    return keys


def _site(name: str, shape: tuple[int, ...], assigned: Mapping[str, set[str]]) -> Site | None:
    *owners, leaf = name.split(".")
    if not owners or not all(part.isdigit() or part in assigned for part in owners):
        return None
    if len(shape) == 1:
        return rebuild_site(name, "parameter", shape, {})
    kinds = {KINDS.get(made) for made in assigned.get(owners[-1], {""})}
    if leaf != "weight" or len(shape) != 2 or len(kinds) != 1 or None in kinds:
        return None
    kind = str(kinds.pop())
    sizes = shape[::-1] if kind == "embedding" else shape
    return rebuild_site(".".join(owners), kind, sizes, {})
