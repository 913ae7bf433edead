"""How far a model's answer moves when the same batch runs once more: a consistency loss.

The model's last training forward is remembered by a hook, with what it was called on, and repeated
when the loss is asked for; whatever is random in the model (experts, dropout) is drawn anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import PlaitError


class SecondPass:
    """Repeats the last training forward of `model`; `close` takes the hook off."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._last: tuple[Any, Any, Any] | None = None
        self._repeating = False
        self._handle = model.register_forward_hook(self._remember, with_kwargs=True)

    def _remember(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module.training and torch.is_grad_enabled() and not self._repeating:
            self._last = (args, kwargs, output)

    def divergence(self) -> Tensor | None:
        """Mean over predictions of (KL(p || q) + KL(q || p)) / 2 of first and second pass.

        None where no training forward came since the last call.
        """
        if self._last is None:
            return None
        (args, kwargs, output), self._last = self._last, None
        self._repeating = True
        try:
            second = self.model(*args, **kwargs)
        finally:
            self._repeating = False
        return symmetric_kl(_logits(output), _logits(second))

    def close(self) -> None:
        self._last = None
        self._handle.remove()


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2 of logits [..., classes], averaged, in float32 or wider."""
    wide = torch.promote_types(first.dtype, torch.float32)
    p, q = (logits.to(wide).log_softmax(-1) for logits in (first, second))
    return 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()


def _logits(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.dim() < 1:
        raise PlaitError(
            f"the model's output ({type(output).__name__}) has no logits to compare between two "
            "passes; let forward return logits, or set kl=0."
        )
    return found
