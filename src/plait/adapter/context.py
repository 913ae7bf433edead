"""What routing needs beside x, and what routers leave behind for losses and statistics.

    with plait.routing(model, task=3, attention_mask=mask):
        loss = model(**batch).loss + plait.auxiliary_loss(model)

One `Context` per model, shared by every delta of every adapter: nothing travels through forward's
keyword arguments, so any model works.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Context:
    """Values set by `plait.routing(...)`, and records left by routers during forward."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.records: dict[str, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Records hold this forward's graph, which can be neither copied nor pickled.
        return {"values": self.values, "records": {}}

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def record(self, path: str, **tensors: Tensor) -> None:
        """Keep this forward's tensors of one router.

        Ignored while autograd runs backward: gradient checkpointing recomputes the forward there,
        and its tensors would be counted twice (and kept alive).
        """
        if torch._C._current_graph_task_id() == -1:
            self.records[path] = tensors

    def clear(self) -> None:
        self.records = {}
