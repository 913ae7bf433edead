"""How passes run: in eval mode, nothing trainable, chosen adapters on, all put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import activate
from plait.adapter.activation import Weights
from plait.adapter.state import find_state
from plait.errors import PlaitError

Active = str | Sequence[str] | Mapping[str, Weights]
"""Adapters, as `plait.activate` takes them; () is the base model."""


@contextmanager
def frozen(model: nn.Module, active: Active = ()) -> Iterator[torch.device]:
    """Within the block `model` is its base with the adapters `active`, in eval mode, and neither
    its parameters nor theirs require a gradient.

    Everything is restored afterwards, also when the block raises. Yields the device for batches.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    state = find_state(model)
    before = dict(state.active) if state is not None else {}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        try:
            activate(model, active)
            for module in training:
                module.training = False
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield device
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True
            activate(model, before)


def to_device(batch: Any, device: torch.device) -> dict[str, Any]:
    """The batch's tensors on `device`; anything else as it is."""
    if not isinstance(batch, Mapping):
        raise PlaitError(
            f"a batch is a {type(batch).__name__}; give dicts of keyword arguments for the model."
        )
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss compares position t with label t + 1, as causal LMs do."""
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    endings = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    return type(model).__name__.endswith(endings) and not encoder_decoder
