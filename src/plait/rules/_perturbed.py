"""A perturbation that training forwards see and no other forward does."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn


class Perturbation(Protocol):
    """Something that can be switched on and off; on again within a step, it is the same one."""

    def on(self) -> None: ...

    def off(self) -> None: ...


class TrainingForwards:
    """Switches a perturbation on at a step's first training forward, until `end_step`.

    Other forwards of the model (in evaluation mode, or without gradients) run with it off; after
    them it is as it was, for a backward pass that is still to come. Between a training forward and
    the end of the step it stays on: gradient checkpointing runs blocks again in backward, outside
    of any forward of the model.
    """

    def __init__(self, model: nn.Module, perturbation: Perturbation) -> None:
        self.perturbation = perturbation
        self.active = False
        self._before: list[bool] = []
        self._handles = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: Any) -> None:
        trains = module.training and torch.is_grad_enabled()
        self._before.append(trains or self.active)
        self._switch(trains)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._switch(self._before.pop())

    def _switch(self, wanted: bool) -> None:
        if wanted == self.active:
            return
        if wanted:
            self.perturbation.on()
        else:
            self.perturbation.off()
        self.active = wanted

    def end_step(self) -> None:
        """Off, until the next step's first training forward."""
        self._switch(False)

    def close(self) -> None:
        self.end_step()
        for handle in self._handles:
            handle.remove()
