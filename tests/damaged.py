"""Adapters that look trained, for tests that damage them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

import plait
from plait.adapter import Adapter
from tiny import llama

LAYERS = 8


def deep_model(**changes: Any) -> nn.Module:
    """Eight layers: enough for a site to stand out from."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    return llama(**{**sizes, **changes})


def look_trained(adapter: Adapter, seed: int = 0, size: float = 0.02) -> Adapter:
    """Steps on every factor, larger towards the last layers and 5 % apart from site to site."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for i, delta in enumerate(adapter.deltas.values()):
            trend = 0.7 + 0.6 * i / len(adapter.deltas)
            own = math.exp(0.05 * float(torch.randn((), generator=draw)))
            for parameter in delta.parameters():
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.add_(size * trend * own * noise)
        for parameter in adapter.shared.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=draw))
    return adapter


def lora(
    model: nn.Module,
    name: str = "a",
    seed: int = 0,
    rank: int = 4,
    size: float = 0.02,
    **options: Any,
) -> Adapter:
    """A LoRA that looks trained, on no model any more."""
    adapter = plait.attach(model, "lora", name=name, rank=rank, seed=seed, **options)
    look_trained(adapter, seed, size)
    plait.detach(model, name)
    return adapter


def site(layer: int, module: str) -> str:
    block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{block}.{module}"


def save_base(model: nn.Module, path: Path) -> Path:
    model.save_pretrained(path)  # type: ignore[operator]
    return path
