"""Plait: one library for the whole life of low-rank adapters.

    adapter = plait.attach(model, "lora", rank=16, alpha=32, targets="all-linear", name="sql")
    plait.activate(model, {"sql": 1.0, "french": 0.5})
    adapter.save("out/sql")

Names are loaded when first used, so `import plait` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Adapter": "plait.adapter",
    "Delta": "plait.adapter",
    "Method": "plait.adapter",
    "Options": "plait.adapter",
    "PairDelta": "plait.adapter",
    "PairOptions": "plait.adapter",
    "PlaitError": "plait.errors",
    "Rule": "plait.adapter",
    "RuleStack": "plait.adapter",
    "activate": "plait.adapter",
    "adapters": "plait.adapter",
    "attach": "plait.adapter",
    "auxiliary_loss": "plait.adapter",
    "detach": "plait.adapter",
    "extract": "plait.compression",
    "find_sites": "plait.adapter",
    "fuse": "plait.adapter",
    "get_method": "plait.adapter",
    "load": "plait.adapter.formats",
    "merge": "plait.merging",
    "merge_checkpoints": "plait.merging",
    "merge_recipe": "plait.merging.recipes",
    "method_names": "plait.adapter",
    "pack": "plait.compression",
    "per_row": "plait.adapter",
    "read_adapter": "plait.adapter.formats",
    "register": "plait.adapter",
    "routing": "plait.adapter",
    "search": "plait.merging.search",
    "squeeze": "plait.compression",
    "unfuse": "plait.adapter",
}

__all__ = [*sorted(_HOME), "__version__"]

if TYPE_CHECKING:  # the names above, for type checkers and editors
    from plait.adapter import (  # noqa: F401
        Adapter,
        Delta,
        Method,
        Options,
        PairDelta,
        PairOptions,
        Rule,
        RuleStack,
        activate,
        adapters,
        attach,
        auxiliary_loss,
        detach,
        find_sites,
        fuse,
        get_method,
        method_names,
        per_row,
        register,
        routing,
        unfuse,
    )
    from plait.adapter.formats import load, read_adapter  # noqa: F401
    from plait.compression import extract, pack, squeeze  # noqa: F401
    from plait.errors import PlaitError  # noqa: F401
    from plait.merging import merge, merge_checkpoints  # noqa: F401
    from plait.merging.recipes import merge_recipe  # noqa: F401
    from plait.merging.search import search  # noqa: F401


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'plait' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
