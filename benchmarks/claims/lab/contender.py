"""One side of a claim: a method with its options, and the learning rates it is tuned over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Contender:
    """A method as it enters a trial. Everything that changes its outcome is a field.

    Attributes:
        label: its name in tables.
        method: as in `plait.attach`; "full" trains the base itself, under its rules if it has any.
        options: the method's options; `targets` and `overrides` may stand among them.
        initializer: as in `plait.attach`, a name.
        rules: as in `plait.RuleStack`.
        rates: the learning rates it is tuned over, at least four.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    initializer: str | None = None
    rules: Sequence[Any] = ()
    rates: Sequence[float] = RATES

    def key(self, **where: Any) -> str:
        """What a stored trial is found by: the same for every claim that runs the same thing."""
        spec = {k: v for k, v in asdict(self).items() if k not in ("label", "rates")}
        text = json.dumps({**spec, **where}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
