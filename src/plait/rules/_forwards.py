"""Running a model as a rule needs it: without what is random, on other weights, for few gradients.

Each is a block after which the model is what it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from plait.adapter.state import find_state


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout within the block; modules that did not train before do not train after it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def holding(parameters: Sequence[nn.Parameter], values: Iterable[Tensor]) -> Iterator[None]:
    """The parameters have these values within the block, in their own dtype and place.

    Storages are exchanged, not contents: what autograd saved of an earlier forward stays valid.
    """
    own = [p.data for p in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value.detach().to(parameter.device, parameter.dtype)
        yield
    finally:
        for parameter, data in zip(parameters, own, strict=True):
            parameter.data = data


@contextmanager
def unrecorded(model: nn.Module) -> Iterator[None]:
    """What routers leave behind within the block is forgotten: their losses stay the batch's."""
    state = find_state(model)
    if state is None:
        yield
        return
    kept, state.context.records = state.context.records, {}
    try:
        yield
    finally:
        state.context.records = kept


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """None of the parameters requires a gradient within the block."""
    training = [p for p in parameters if p.requires_grad]
    for parameter in training:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in training:
            parameter.requires_grad_(True)
