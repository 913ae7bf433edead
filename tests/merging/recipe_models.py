"""Tiny models of many layers as folders of safetensors, for tests of recipes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, INNER, WORDS = 8, 12, 20
LAYER = {
    "input_layernorm.weight": (HIDDEN,),
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "mlp.up_proj.weight": (INNER, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, INNER),
}
_NUMBER = re.compile(r"model\.layers\.(\d+)\.")


def names(layers: int) -> list[str]:
    inner = [f"model.layers.{i}.{rest}" for i in range(layers) for rest in LAYER]
    return ["model.embed_tokens.weight", *inner, "model.norm.weight", "lm_head.weight"]


def shape_of(name: str, words: int = WORDS) -> tuple[int, ...]:
    if _NUMBER.match(name):
        return LAYER[_NUMBER.sub("", name)]
    return (HIDDEN,) if name == "model.norm.weight" else (words, HIDDEN)


def write_model(
    folder: Path,
    seed: int,
    layers: int = 4,
    *,
    of: dict[str, Tensor] | None = None,
    words: int = WORDS,
    **config: object,
) -> dict[str, Tensor]:
    """A model folder: random weights, or those of `of` with random changes of heavy tails."""
    g = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(*shape_of(n, words), generator=g) for n in names(layers)}
    if of is not None:
        made = {n: of[n] + 0.1 * t**3 for n, t in made.items()}
    folder.mkdir(parents=True)
    save_file(made, folder / "model.safetensors")
    facts = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
        "vocab_size": words,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps({**facts, **config}))
    return made


def loaded(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def layer_of(name: str) -> int | None:
    match = _NUMBER.match(name)
    return None if match is None else int(match[1])


def gradient(points: Sequence[float], name: str, layers: int) -> float:
    """A list over the layers, by numpy's interpolation; the first point outside of them."""
    import numpy as np

    layer = layer_of(name)
    depth = 0.0 if layer is None else layer / (layers - 1)
    return float(np.interp(depth * (len(points) - 1), range(len(points)), points))
