"""Where a device's own implementation of a kernel is plugged in.

The eager implementations in this room run on every device that PyTorch has; this table names the
exceptions. A Triton or CUDA version registers itself under its device type:

    dispatch.register("lora_linear", "cuda", lora_linear_triton)

and is then called with `(x, weight, bias, A, B, scale, drop)` for `lora_linear`, where `drop` is a
`Dropout` or None, instead of the eager node. It owes what the eager one promises: gradients in x,
A and B, autocast's dtypes, and the mask of (dropout, seed). The table is empty today.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OPERATIONS = ("lora_linear", "lora_linear_group", "lora_add", "multi_lora_")
_table: dict[tuple[str, str], Callable[..., Any]] = {}


def register(operation: str, device_type: str, run: Callable[..., Any]) -> None:
    """Use `run` for `operation` on devices of this type; the last registration wins."""
    if operation not in OPERATIONS:
        raise ValueError(f"no kernel operation {operation!r}; choose one of {OPERATIONS}")
    _table[operation, device_type] = run


def unregister(operation: str, device_type: str) -> None:
    """Return `operation` on this device type to its eager implementation."""
    _table.pop((operation, device_type), None)


def find(operation: str, device_type: str) -> Callable[..., Any] | None:
    """The registered implementation, or None for the eager one."""
    return _table.get((operation, device_type)) if _table else None
