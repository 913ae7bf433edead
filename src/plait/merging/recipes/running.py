"""`merge_recipe`: a recipe's checks, its job, its result."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.merging.engine import files_beside, run_job, staging_for
from plait.merging.preflight import check_models, check_surplus, check_tasks
from plait.merging.recipes.adapters import merge_adapters
from plait.merging.recipes.configs import configs
from plait.merging.recipes.inputs import Inputs
from plait.merging.recipes.reading import parse_recipe, read_text
from plait.merging.recipes.references import Find, Shelf
from plait.merging.recipes.resolving import Resolver
from plait.merging.recipes.schema import Recipe
from plait.merging.recipes.templates import chat_template
from plait.merging.recipes.tokenizer_files import NAMES
from plait.merging.recipes.vocabulary import Vocabulary, different_tokens, plan_vocabulary
from plait.merging.work import Job, Task, plan_tasks

SHARD = 5 * 10**9
ALIGN = "add tokenizer_source: base (or union, or a model's path) to the recipe."
COPY = "recipe.yaml"
"""The recipe as it was, in the result's folder."""


@dataclass(frozen=True)
class Merged:
    """What came of a recipe."""

    path: Path
    method: str
    inputs: tuple[str, ...]
    notes: tuple[str, ...] = ()
    adapter: Any = None
    """The merged adapter, where the recipe's models are adapters."""
    paths: tuple[str, ...] = ()
    """Where those lie."""


def merge_recipe(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    models: Mapping[str, str] | None = None,
    find: Find | None = None,
    to: str = "plait",
    seed: int = 0,
    shard_size: int = SHARD,
    processes: int = 1,
    progress: bool = False,
) -> Merged:
    """Run a merge file: mergekit's documented YAML as it is, or one with Plait's own keys.

    Args:
        path: the YAML file.
        out: the folder of the result: a checkpoint; or, where all models are adapters, an adapter.
        models: {name in the recipe: folder}, for models that lie elsewhere.
        find: a further place to look names up in.
        to: the format of an adapter.
        seed, shard_size, processes, progress: as in `merge_checkpoints`.

    Names are looked up as paths from here and from the recipe's folder, then on the hub. Memory
    holds one tensor of every input. A run that was killed goes on where it stood. The result's
    merge.json says what was done and, for every tensor, norms, cosines and conflicts of the inputs.
    Raises PlaitError, naming the line or the tensor, for what cannot be merged.
    """
    file, target = Path(path), Path(out)
    text = read_text(file)
    recipe = parse_recipe(text, str(file))
    shelf = Shelf(file.parent, models, find)
    references = recipe.references()
    listed = [r for r in references if r != recipe.base_model]
    if listed and all(shelf.is_adapter(r) for r in listed) and recipe.writes_adapter:
        adapter, told = merge_adapters(recipe, shelf, seed=seed, name=target.name)
        written = Path(adapter.save(target, format=to))
        lie = tuple(shelf.path(reference.model) for reference in listed)
        names = tuple(map(str, listed))
        return Merged(written, recipe.wanted_method, names, told, adapter, lie)
    staging = staging_for(target)
    with Inputs(recipe, shelf) as inputs:
        for reference in references:
            inputs.number(reference)
        tokens = recipe.wanted_tokens
        vocabulary = None if tokens is None else plan_vocabulary(tokens, inputs)
        resolver = Resolver(recipe, inputs, vocabulary)
        tasks = resolver.tasks()
        notes = [*resolver.notes, *(different_tokens(inputs) if tokens is None else ())]
        job = Job(
            models=tuple(inputs.models),
            seed=seed,
            folder=str(staging),
            shards=plan_tasks(tasks, shard_size),
            rows=() if vocabulary is None else tuple(vocabulary.rows),
            cast=recipe.dtype,
            described=_described(recipe, text, inputs, seed, notes),
        )
        _check(recipe, job, tasks, inputs)
        kept = resolver.layers()
        files = _files(recipe, inputs, vocabulary, kept, text)
    run_job(job, target, files, processes=processes, progress=progress)
    return Merged(target, recipe.wanted_method, tuple(map(str, references)), tuple(notes))


def _check(recipe: Recipe, job: Job, tasks: Sequence[Task], inputs: Inputs) -> None:
    """Everything that can be told before a tensor is read."""
    first = inputs.checkpoint(inputs.pattern)
    read: dict[str, set[str]] = defaultdict(set)
    for task in tasks:
        for one in (*task.reads, *([task.base] if task.base is not None else [])):
            read[inputs.models[one.model].path].add(one.name)
    skipped = ["vocab_size"] + ([] if recipe.models is not None else ["num_hidden_layers"])
    used = [model for model in inputs.models if model.path in read]
    check_models(first, used, inputs.checkpoints, *skipped)
    check_tasks(job, inputs.checkpoints, ALIGN)
    if recipe.models is not None:
        for path, names in read.items():
            made = {task.planned.name for task in tasks}
            check_surplus(names | made, [inputs.checkpoints[path]], first)
    for path in inputs.checkpoints:
        if os.path.realpath(path) == os.path.realpath(Path(job.folder).parent):
            raise PlaitError(f"the result would lie inside of {path}; write it elsewhere.")


def _described(
    recipe: Recipe, text: str, inputs: Inputs, seed: int, notes: Sequence[str]
) -> dict[str, Any]:
    base = recipe.base_model
    return {
        "method": recipe.wanted_method,
        "base": None if base is None else str(inputs.models[inputs.number(base)]),
        "inputs": [str(model) for model in inputs.models],
        "seed": seed,
        "notes": list(notes),
        "recipe": text,
    }


def _files(
    recipe: Recipe,
    inputs: Inputs,
    vocabulary: Vocabulary | None,
    kept: list[int] | None,
    text: str,
) -> dict[str, Path | bytes]:
    """What lies beside the weights: configs as the result needs them, tokenizer, recipe."""
    files = files_beside(inputs.checkpoint(inputs.pattern).path)
    if vocabulary is not None:
        files = {name: f for name, f in files.items() if name not in NAMES} | vocabulary.files
    files |= configs(files, recipe, vocabulary, kept)
    if recipe.chat_template is not None:
        folders = [inputs.checkpoint(r).path for r in recipe.references()]
        template = chat_template(recipe.chat_template, folders)
        if template is not None:
            files["chat_template.jinja"] = template.encode()
            files |= _without_template(files)
    return files | {COPY: text.encode()}


def _without_template(files: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """The tokenizer's config without a template of its own, which would contradict the file."""
    config = files.get("tokenizer_config.json")
    if config is None:
        return {}
    values = json.loads(config if isinstance(config, bytes) else config.read_bytes())
    values.pop("chat_template", None)
    return {"tokenizer_config.json": json.dumps(values, indent=1, ensure_ascii=False).encode()}
