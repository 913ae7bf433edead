"""The training passes of a model, remembered so that a rule can look at one or repeat it.

A rule's `extra_loss` sees no batch. `Passes` keeps what the last training forward was called on
and what it answered; a rule may run the model once more (on the same batch, on another one) and
that pass is not remembered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import Run
from plait.adapter.activation import install_plans
from plait.adapter.state import get_state
from plait.errors import PlaitError

IGNORE = -100
"""The label of positions without one, as in PyTorch and transformers."""


@dataclass(frozen=True)
class Pass:
    """One training forward: `model(*args, **kwargs)` gave `output`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def predictions(self, output: Any = None) -> Tensor:
        """Logits [n, classes] of what has a label: of this pass, or of another on its batch.

        A prompt's and padding's positions are left out, as a causal model's loss leaves them out;
        without labels by name everything counts.
        """
        logits = logits_of(self.output if output is None else output)
        shifted = self._shifted(logits)
        return logits.flatten(0, -2) if shifted is None else logits[shifted != IGNORE]

    def targets(self) -> Tensor:
        """The labels [n] of `predictions`' rows; PlaitError for a batch without labels."""
        shifted = self._shifted(logits_of(self.output))
        if shifted is None:
            raise PlaitError("the batch has no labels [rows, length] by name to compare with.")
        return shifted[shifted != IGNORE]

    def _shifted(self, logits: Tensor) -> Tensor | None:
        """What each position is to predict."""
        shifted, labels = self.kwargs.get("shift_labels"), self.kwargs.get("labels")
        if shifted is None and isinstance(labels, Tensor) and labels.dim() == 2:
            shifted = nn.functional.pad(labels, (0, 1), value=IGNORE)[:, 1:]
        if not isinstance(shifted, Tensor) or shifted.shape != logits.shape[:-1]:
            return None
        return shifted


class Passes:
    """Remembers the last training forward of `model`; `close` takes the hook off."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._last: Pass | None = None
        self._quiet = False
        self._handle = model.register_forward_hook(self._remember, with_kwargs=True)

    def _remember(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module.training and torch.is_grad_enabled() and not self._quiet:
            self._last = Pass(args, kwargs, output)

    def take(self) -> Pass | None:
        """The last training forward since the last call, or None; it is forgotten here."""
        last, self._last = self._last, None
        return last

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Forwards within the block are a rule's own and not remembered."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def again(self, done: Pass) -> Any:
        """The model's answer to the same batch once more; what is random is drawn anew."""
        with self.quiet():
            return self.model(*done.args, **done.kwargs)

    @torch.no_grad()
    def of_base(self, done: Pass) -> Tensor:
        """The predictions [n, classes] that the base alone makes for the same batch."""
        with base_alone(self.model):
            return done.predictions(self.again(done))

    def close(self) -> None:
        self._last = None
        self._handle.remove()


@contextlib.contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Within the block the model runs without adapters, which stay active."""
    state = get_state(model)
    before = state.installed
    install_plans(state, [])
    try:
        yield
    finally:
        install_plans(state, before)


def refuse_trained_base(run: Run, rule: str, instead: str) -> None:
    """PlaitError where a rule that runs the base alone meets a method that trains W in place."""
    for adapter in run.adapters:
        if adapter.method.traits.edits_base:
            raise PlaitError(
                f"rule {rule} runs the base between a forward and its backward, and adapter "
                f"{adapter.name!r} ({adapter.method.name}) trains the base's weights in place; "
                f"{instead}."
            )


def loss_of(output: Any) -> Tensor:
    """The loss that a model answered with: its `.loss`, or the answer itself where it is one."""
    found = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(found, Tensor) or found.dim() > 0:
        raise PlaitError(
            f"the model's output ({type(output).__name__}) has no loss; give batches with labels "
            "to a model whose forward returns one."
        )
    return found


def logits_of(output: Any) -> Tensor:
    """The logits [..., classes] that a model answered with."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.dim() < 1:
        raise PlaitError(
            f"the model's output ({type(output).__name__}) has no logits to compare between two "
            "passes; let forward return logits, or leave the loss over them out."
        )
    return found


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2 of logits [..., classes], averaged, in float32 or wider."""
    wide = torch.promote_types(first.dtype, torch.float32)
    p, q = (logits.to(wide).log_softmax(-1) for logits in (first, second))
    return 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
