"""`Recipe`: everything about a training run in one place; it is the YAML file and the command line.

    base: smollm2-135m            plait train recipe.yaml lr=1e-3 rank=32 rules.lora-plus.ratio=8
    method: lora
    options: {rank: 16}
    data: train.jsonl
    steps: 200

A key that does not exist is an error that names the nearest one. Values are checked by the type of
their field, before anything is loaded. `rank=32` is short for `options.rank=32` where `rank` is
an option of the method.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from plait.errors import PlaitError, unknown

Scheduler = Literal["cosine", "linear", "constant", "constant_with_warmup"]


@dataclass(frozen=True)
class Recipe:
    """The settings of one run; every field may stand in the YAML file or be given as key=value."""

    # -- the model --------------------------------------------------------------------------------
    base: str = "smollm2-135m"
    """A short name, a local directory or a hub id (see `plait.training.bases`)."""
    dtype: str = "auto"
    """Of the base weights: "auto" (as stored), "float32", "bfloat16", "float16". Adapters are
    float32 in any case. Full training (`method: none`) wants float32."""
    task_type: Literal["causal-lm"] = "causal-lm"
    """What is trained; written into exports."""

    # -- the adapter ------------------------------------------------------------------------------
    method: str = "lora"
    """A name from `plait methods`, or "none": train the base weights themselves."""
    options: dict[str, Any] = field(default_factory=dict)
    """The method's options (rank, alpha, dropout, ...)."""
    name: str = "default"
    """The adapter's name."""
    targets: str | list[str] | None = None
    """Sites: a keyword ("all-linear"), names, or a regular expression; None: the method's own."""
    exclude: str | list[str] | None = None
    """Sites to leave out, in the same forms."""
    layers: int | list[int] | None = None
    """Only blocks of these indices."""
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{site pattern: {option: value}} for sites with other options."""
    train_modules: list[str] = field(default_factory=list)
    """Whole modules trained and saved along (a task head)."""
    initializer: str | dict[str, dict[str, Any]] | None = None
    """Where the factors start: a name, or {name: {option: value}}; None: the method's own."""
    initializer_batches: int = 8
    """Training batches that an initialiser may look at."""
    rules: list[str | dict[str, dict[str, Any]]] = field(default_factory=list)
    """Optimisation rules in order: names, or {name: {option: value}}."""

    # -- data -------------------------------------------------------------------------------------
    data: str | list[str] | None = None
    """JSON-lines files to train on (see `plait.training.data` for the row forms)."""
    eval_data: str | list[str] | None = None
    """Held-out files of the same forms."""
    template: bool = True
    """Use the tokenizer's chat template; False joins prompt and completion as they are."""
    turns: Literal["all", "last"] = "all"
    """Which answers of a conversation the loss covers."""
    max_length: int = 1024
    """Tokens after which an example is cut (texts are split). Memory grows in proportion."""
    packing: bool = False
    """Several short examples in one row, each seeing only itself: less padding, other batches."""
    show_examples: int = 2
    """Samples printed with their loss mask before training starts."""

    # -- optimisation -----------------------------------------------------------------------------
    steps: int | None = None
    """Optimiser steps; None: `epochs` decides."""
    epochs: float = 1.0
    """Passes over the data when `steps` is None."""
    batch_size: int = 8
    """Rows a step and process; memory grows in proportion."""
    gradient_accumulation: int = 1
    """Batches summed up before each step: the effect of a larger batch in the memory of one."""
    lr: float = 2e-4
    """Peak learning rate. The best one differs by method, often tenfold: tune it for each."""
    scheduler: Scheduler = "cosine"
    warmup: float = 0.03
    """Steps of rising learning rate; a share of the run below 1."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Greatest norm of the gradients before a step; 0 clips nothing."""
    gradient_checkpointing: bool = False
    """Recompute the blocks' activations in backward: about a third more time, far less memory."""
    seed: int = 0
    """Of the adapter's start, the data's order, dropout and the rules."""

    # -- output -----------------------------------------------------------------------------------
    output: str = "out"
    """Folder of the run: adapter/, checkpoints, log.jsonl, recipe.yaml."""
    save_every: int | None = None
    """Steps between checkpoints; None: a tenth of the run."""
    keep_checkpoints: int = 2
    eval_every: int | None = None
    """Steps between evaluations on `eval_data`; None: at the end only."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    export: list[Literal["peft"]] = field(default_factory=lambda: ["peft"])
    """Formats written beside Plait's own at the end."""
    parity: bool = True
    """At the end, compare the logits of the attached, fused, reloaded and exported adapter."""

    def __post_init__(self) -> None:
        for name, least in (
            *(("max_length", 2), ("batch_size", 1), ("gradient_accumulation", 1)),
            *(("log_every", 1), ("keep_checkpoints", 1), ("lr", 0), ("clip", 0), ("warmup", 0)),
        ):
            if getattr(self, name) < least:
                raise PlaitError(f"recipe: {name} is {getattr(self, name)}; at least {least}.")
        for name in ("steps", "save_every", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlaitError(f"recipe: {name} is {value}; at least 1, or leave it out.")
        if self.steps is None and self.epochs <= 0:
            raise PlaitError(f"recipe: epochs is {self.epochs}; give more than 0, or steps.")

    # -- making one -------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a YAML file, changed by `key=value` overrides."""
        import yaml

        file = Path(path)
        if not file.is_file():
            raise PlaitError(f"recipe {file}: there is no such file.")
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            reason = " ".join(str(e).split())
            raise PlaitError(f"recipe {file}: not readable as YAML ({reason}).") from None
        if not isinstance(values, dict):
            raise PlaitError(f"recipe {file}: lines of `key: value` are wanted at the top.")
        return cls.make(values, overrides, where=str(file))

    @classmethod
    def make(
        cls, values: Mapping[str, Any] | None = None, overrides: Sequence[str] = (), where: str = ""
    ) -> Recipe:
        """A recipe from a mapping; `where` names it in errors."""
        tree: dict[str, Any] = {}
        where = where or "recipe"
        for key, value in (values or {}).items():
            _put(tree, [str(key)], copy.deepcopy(value), where)
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise PlaitError(f"override {override!r}: write it as key=value.")
            _put(tree, key.strip().split("."), _parse(text), f"override {override!r}")
        return _checked(tree, where)

    def replace(self, **changes: Any) -> Recipe:
        """A recipe with other values, checked like any."""
        return _checked({**dataclasses.asdict(self), **changes}, "recipe")

    # -- writing it -------------------------------------------------------------------------------

    def dump(self) -> str:
        """The recipe as YAML: every field, so that a later default changes nothing."""
        import yaml

        plain = json.loads(json.dumps(dataclasses.asdict(self)))  # YAML knows no tuples
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)

    # -- what follows from it ---------------------------------------------------------------------

    def total_steps(self, rows: int, processes: int = 1) -> int:
        """Optimiser steps of the whole run over `rows` rows."""
        if self.steps is not None:
            return self.steps
        batches = math.ceil(rows / (self.batch_size * processes))
        per_epoch = math.ceil(batches / self.gradient_accumulation)
        return max(1, math.ceil(self.epochs * per_epoch))

    def warmup_steps(self, total: int) -> int:
        return int(self.warmup if self.warmup >= 1 else math.ceil(self.warmup * total))


FIELDS = {f.name: f for f in dataclasses.fields(Recipe)}


def _put(tree: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
    """Set tree[k0][k1]... = value; a shorthand key goes under `options` later, in `_checked`."""
    first, *rest = keys
    if first == "rules" and rest:
        _put_rule(tree, rest, value, where)
        return
    for key in keys[:-1]:
        inner = tree.setdefault(key, {})
        if not isinstance(inner, dict):
            raise PlaitError(f"{where}: {key!r} holds no further keys.")
        tree = inner
    tree[keys[-1]] = value


def _put_rule(tree: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
    """`rules.lora-plus.ratio=8`: an option of a rule, which joins the list if it is not there."""
    if len(keys) != 2:
        raise PlaitError(f"{where}: write rules.<rule>.<option>=value, or rules=[names].")
    name, option = keys[0].replace("_", "-"), keys[1]
    rules = tree.setdefault("rules", [])
    for index, rule in enumerate(rules):
        known = next(iter(rule)) if isinstance(rule, dict) else rule
        if known == name:
            given = dict(rule[known] or {}) if isinstance(rule, dict) else {}
            rules[index] = {name: {**given, option: value}}
            return
    rules.append({name: {option: value}})


def _parse(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError:
        return text


def _checked(tree: dict[str, Any], where: str) -> Recipe:
    values = dict(tree)
    options = values.get("options") or {}
    method = values.get("method", FIELDS["method"].default)
    if not isinstance(method, str) or not isinstance(options, dict):
        raise PlaitError(f"{where}: method is a name, and options are `option: value` lines.")
    known = option_types(method)
    for key in list(values):
        if key not in FIELDS and key in known:
            options = {**options, key: values.pop(key)}
        elif key not in FIELDS:
            raise unknown("key", key, {*FIELDS, *known}, where=where)
    values["options"] = {
        key: _typed(known[key], value, f"{where}: options.{key}")
        if key in known
        else _unknown_option(key, known, method)
        for key, value in options.items()
    }
    values["rules"] = [_checked_rule(r, where) for r in _listed(values.get("rules"))]
    for key in ("exclude", "targets", "layers", "data", "eval_data"):
        if values.get(key) == "":
            values[key] = None
    types = _field_types()
    typed = {k: _typed(types[k], v, f"{where}: {k}") for k, v in values.items()}
    return Recipe(**typed)


def _unknown_option(key: str, known: Mapping[str, Any], method: str) -> Any:
    raise unknown("option", key, known, where=f"method {method!r}")


def _listed(rules: Any) -> list[Any]:
    if rules is None or rules == "":
        return []
    return list(rules) if isinstance(rules, list | tuple) else [rules]


def _checked_rule(rule: Any, where: str) -> Any:
    """A rule's name and its options, typed by the rule's own fields."""
    from plait.adapter import get_method

    if isinstance(rule, str):
        rule = {rule: {}}
    if not isinstance(rule, dict) or len(rule) != 1:
        raise PlaitError(f"{where}: a rule is a name or one {{name: options}} pair, not {rule!r}.")
    ((name, given),) = rule.items()
    method = get_method(str(name))
    if method.rule is None:
        raise PlaitError(f"{where}: {name!r} is no rule (axis: {method.axis}).")
    known = _types_of(method.rule)
    typed = {}
    for key, value in (given or {}).items():
        if key not in known:
            raise unknown("option", key, known, where=f"rule {method.name!r}")
        typed[key] = _typed(known[key], value, f"{where}: rules.{method.name}.{key}")
    return {method.name: typed} if typed else method.name


def option_types(method: str) -> dict[str, Any]:
    """{option: type} of a method; nothing for "none"."""
    from plait.adapter import get_method

    return {} if method == "none" else _types_of(get_method(method).options)


def _types_of(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


@cache
def _field_types() -> dict[str, Any]:
    return _types_of(Recipe)


def _typed(kind: Any, value: Any, where: str) -> Any:
    """`value` as the type `kind`; YAML reads 1e-4 as text, so text of a number is one."""
    from pydantic import TypeAdapter, ValidationError

    if isinstance(value, str) and value.strip().lower() in ("none", "null"):
        value = None if type(None) in getattr(kind, "__args__", ()) else value
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as e:
        reason = e.errors()[0]["msg"].lower()
        shown = getattr(kind, "__name__", None) or str(kind).replace("typing.", "")
        raise PlaitError(f"{where} is {value!r}, where {shown} is wanted ({reason}).") from None
