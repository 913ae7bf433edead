"""A cheap identity for a base model, so that an adapter can notice that it meets the wrong one."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# What makes two checkpoints the same architecture; the rest of a config changes with the loader.
CONFIG_KEYS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
# Weights that keep their names in every loader (fused experts do not), also when tied (lm_head).
FINGERPRINTED = re.compile(r"(embed_tokens|wte|norm|(q|k|v|o)_proj|c_attn|c_proj)\.weight$")


def fingerprint(model_or_path: Any) -> str:
    """32 hex digits of a sha256 over the shape of the config and sampled weights.

    Takes a transformers model or a local model directory (not a hub id), reads a few KB, and does
    not depend on the dtype the model was loaded in (values are compared as bfloat16, and those too
    small for float16 as zero). Quantising the weights changes it; attached adapters do not.
    """
    if isinstance(model_or_path, str | os.PathLike):
        config, names, sample = _open_directory(Path(model_or_path))
    else:
        parameters = dict(model_or_path.named_parameters())
        config, names = model_or_path.config.to_dict(), list(parameters)

        def sample(name: str) -> torch.Tensor:
            return _sample_rows(parameters[name].detach())

    text = config.get("text_config") or config  # multimodal configs nest the language model's
    digest = hashlib.sha256(json.dumps({k: text.get(k) for k in CONFIG_KEYS}).encode())
    chosen = sorted(n for n in names if FINGERPRINTED.search(n) and "plait_" not in n)
    if not chosen:
        raise ValueError("base fingerprint: the model has no embedding, norm or attention weights")
    for name in chosen[:: max(1, len(chosen) // 16)]:
        values = sample(name).cpu().float()
        values = torch.where(values.abs() < 2.0**-14, 0.0, values).to(torch.bfloat16)
        digest.update(name.encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def _sample_rows(tensor: Any) -> torch.Tensor:
    """Up to 4 rows of up to 64 values; `tensor` is a Tensor or a lazy safetensors slice."""
    shape = list(tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape())
    if len(shape) == 1:
        return tensor[:64]
    step = max(1, shape[0] // 4)
    return torch.cat([tensor[row : row + 1, :64] for row in range(0, shape[0], step)][:4])


def _open_directory(path: Path) -> tuple[dict, list[str], Callable[[str], torch.Tensor]]:
    from safetensors import safe_open

    files = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").is_file() or not files:
        raise FileNotFoundError(
            f"base fingerprint: {path} is no local model directory with config.json and "
            "safetensors weights; load the model and pass it instead"
        )
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            where.update(dict.fromkeys(opened.keys(), file))

    def sample(name: str) -> torch.Tensor:
        with safe_open(where[name], framework="pt") as opened:
            return _sample_rows(opened.get_slice(name))

    return json.loads((path / "config.json").read_text()), list(where), sample
