"""config.json and generation_config.json of the result: layers, vocabulary, type of numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.merging.recipes.layers import with_layers
from plait.merging.recipes.schema import Recipe
from plait.merging.recipes.vocabulary import Vocabulary

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def configs(
    files: Mapping[str, Path | bytes],
    recipe: Recipe,
    vocabulary: Vocabulary | None,
    kept: list[int] | None,
) -> dict[str, Path | bytes]:
    """The configs among `files` as the result needs them; `kept` says which layers there are."""
    made: dict[str, Path | bytes] = {}
    for name in ("config.json", "generation_config.json"):
        source = files.get(name)
        if not isinstance(source, Path):
            continue
        old = json.loads(source.read_bytes())
        new = old
        if name == "config.json":
            new = _typed(new, recipe.out_dtype or recipe.dtype)
            new = new if kept is None else with_layers(new, kept)
        if vocabulary is not None:
            new = _worded(new, vocabulary)
        if new != old:
            made[name] = json.dumps(new, indent=2).encode()
    return made


def _typed(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    if dtype is None:
        return config
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: dtype}


def _worded(config: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """The size of the vocabulary, and the same special tokens by their numbers in it."""
    made = dict(config)
    if isinstance(made.get("text_config"), dict):
        made["text_config"] = _worded(made["text_config"], vocabulary)
    if "vocab_size" in made:
        made["vocab_size"] = vocabulary.size
    words = {number: token for token, number in vocabulary.old_ids.items()}
    for key in TOKENS:
        old = made.get(key)
        if isinstance(old, int):
            made[key] = vocabulary.ids.get(words.get(old, ""), old)
        elif isinstance(old, list):
            made[key] = [vocabulary.ids.get(words.get(one, ""), one) for one in old]
    return made
