"""Who may take the fused path and in which precision.

The fused kernels are autograd Functions that differentiate once. Everything that needs to see
inside them (a compiler, functorch, forward-mode or double backward, a tensor subclass that gives
products another meaning) takes the plain PyTorch path of `reference` instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_reference: ContextVar[bool] = ContextVar("plait_kernels_reference", default=False)
_NOTHING = nullcontext()
_PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})


@contextmanager
def use_reference() -> Iterator[None]:
    """Make every kernel take its plain PyTorch path inside this block.

    Needed for double backward (gradient penalties, meta-learning); costs one more pass over the
    outputs a linear. The choice belongs to the current thread or task.
    """
    token = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(token)


def plain_path(*tensors: Tensor | None) -> bool:
    """True where the fused kernels do not apply to these tensors (see the module's docstring)."""
    if torch.compiler.is_compiling():  # first: the tests below cannot be traced
        return True
    if _reference.get() or torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level >= 0:
        return True
    return any(t is not None and type(t) not in _PLAIN for t in tensors)


def compute_dtype(x: Tensor, *weights: Tensor) -> torch.dtype:
    """The dtype in which `F.linear` would multiply `x`: autocast's where active, else x's.

    Raises:
        TypeError: outside autocast, where x and a weight differ, as `F.linear` does.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    for weight in weights:
        if weight.dtype != x.dtype:
            raise TypeError(
                f"x is {x.dtype} but the weight is {weight.dtype}: cast x, or use torch.autocast"
            )
    return x.dtype


def exact_dtypes(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off, where it is on: a fused node's casts are explicit.

    Without this, a backward called inside an autocast region would mix the saved dtypes with
    autocast's, and an in-place product would refuse them.
    """
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING
