"""Which rules may stand in one list: declared by each rule, checked before anything is trained.

A rule *claims* what only one rule of a run can have. What it keeps per shape would be wrong after
a rank changes, so `keeps_shapes` cannot stand beside a claim on the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CLAIMS = {
    "gradients": "replace the gradients of A and B by directions of their own",
    "ranks": "change ranks during training",
    "base": "train weights of the base model",
    "weights": "move the weights between a step's forward pass and its update",
    "gates": "set the weights at which the adapter's sites are active",
    "optimizer": "bring an optimiser of their own",
}
"""{claim: what two rules that have it both do}."""


def conflicts(rules: Sequence[Any]) -> list[str]:
    """Why these rules cannot run together, a sentence for each reason; empty when they can."""
    found = []
    for claim, what in CLAIMS.items():
        names = [type(rule).__name__ for rule in rules if claim in claims_of(rule)]
        if len(names) > 1:
            found.append(f"rules {' and '.join(names)} each {what}; keep one of them.")
    resizing = [type(rule).__name__ for rule in rules if "ranks" in claims_of(rule)]
    fixed = [type(rule).__name__ for rule in rules if rule.keeps_shapes]
    if resizing and fixed:
        found.append(
            f"rule {fixed[0]} keeps a state for every entry of A and B, and rule {resizing[0]} "
            "changes their ranks during training; keep one of them."
        )
    return found


def claims_of(rule: Any) -> frozenset[str]:
    """What one rule claims; bringing an optimiser is seen from what it brings."""
    own: frozenset[str] = rule.claims
    return own | {"optimizer"} if rule.optimizer() is not None else own
