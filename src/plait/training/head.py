"""Logits only where there is a label.

A prompt's positions have no label, yet a causal language model computes (and keeps for backward)
a logit for every word of the vocabulary there: with a large one that is a good part of a step.
transformers' models can leave positions out.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from plait.adapter.site import base_class
from plait.training.data import IGNORE

_WORTH_IT = 0.9
"""Share of labelled positions above which nothing is gained."""


@cache
def _can_skip(cls: Any) -> bool:
    """Does the model take `logits_to_keep`, and hand `shift_labels` on to its loss?"""
    if "logits_to_keep" not in inspect.signature(cls.forward).parameters:
        return False
    try:  # nothing but the source tells whether further keywords reach the loss
        loss = inspect.getsource(inspect.unwrap(cls.forward)).partition("self.loss_function(")[2]
    except (OSError, TypeError):
        return False
    return "**kwargs" in loss


def labelled_positions(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` changed so that the model computes logits at positions with a label in some row.

    The loss and its gradients are the same; unchanged for models that cannot.
    """
    labels = inputs.get("labels")
    base: Any = base_class(model)
    if not isinstance(labels, Tensor) or labels.dim() != 2 or not _can_skip(base):
        return inputs
    shifted = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
    positions = (shifted != IGNORE).any(0).nonzero().flatten()
    if len(positions) == 0 or len(positions) > _WORTH_IT * labels.shape[1]:
        return inputs
    return {**inputs, "logits_to_keep": positions, "shift_labels": shifted[:, positions]}
