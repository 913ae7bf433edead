"""What a forward pass keeps for backward, for claims about memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of activations that backward keeps (weights and the input itself aside)."""
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values())
