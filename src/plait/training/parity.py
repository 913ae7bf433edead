"""Does the adapter that was saved answer like the one that was trained?

The same few batches go through the model with the trained adapter attached, fused into the weights,
read back from its folder, and read back from each export; the greatest |difference| of logits is
compared with what rounding explains. What cannot be compared (a method that does not fuse) says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import Adapter, activate, detach, fuse, unfuse
from plait.errors import PlaitError

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Of fused weights and exports, relative to the greatest |logit|; by the base's dtype. A fused
bfloat16 weight keeps 8 bits of W + dW, where an adapter beside W loses none."""
EXACT = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
"""Of the adapter read back from Plait's own format, which holds every bit."""
AGREEMENT = 0.9
"""Least share of positions with the same most likely token: what the wide tolerance of half
precision would let through."""


@dataclass(frozen=True)
class Comparison:
    """One way of running the adapter against the attached one."""

    name: str
    difference: float | None
    """Greatest |difference| of logits; None when it could not be run."""
    tolerance: float = 0.0
    note: str = ""
    agreement: float = 1.0
    """Share of positions whose most likely token is the same."""

    @property
    def passed(self) -> bool:
        if self.difference is None:
            return True
        return self.difference <= self.tolerance and self.agreement >= AGREEMENT

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.name}: not compared, {self.note}"
        verdict = "ok" if self.passed else "DIFFERS"
        note = f" ({self.note})" if self.note else ""
        shown = f"max |difference| {self.difference:.2e}, tolerance {self.tolerance:.2e}"
        return f"{self.name}: {shown}, same token {self.agreement:.1%}: {verdict}{note}"


@dataclass
class Parity:
    """The comparisons of one adapter."""

    largest_logit: float
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.comparisons)

    def __str__(self) -> str:
        return "\n".join(str(c) for c in self.comparisons)


def check_parity(
    model: nn.Module,
    adapter: Adapter,
    batches: Sequence[Mapping[str, Tensor]],
    folders: Mapping[str, Path],
) -> Parity:
    """Compare the attached adapter with the fused one and with those in `folders` {name: path}.

    The model comes back in eval mode with the adapter active alone. Exports get the tolerance of
    fused weights; `plait`, Plait's own format, is compared exactly.
    """
    model.eval()
    activate(model, adapter.name)
    attached = _logits(model, batches)
    largest = max(float(t.abs().max()) for t in attached)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    loose, exact = TOLERANCE[dtype] * max(largest, 1), EXACT[dtype] * max(largest, 1)
    result = Parity(largest)
    result.comparisons.append(_fused(model, attached, batches, loose))
    for name, folder in folders.items():
        tolerance = exact if name == "plait" else loose
        result.comparisons.append(_reloaded(model, name, folder, attached, batches, tolerance))
        activate(model, adapter.name)
    return result


def _fused(
    model: nn.Module, attached: list[Tensor], batches: Sequence[Any], tolerance: float
) -> Comparison:
    try:
        fuse(model)
    except PlaitError as e:
        return Comparison("fused", None, note=str(e))
    try:
        return _comparison("fused", attached, _logits(model, batches), tolerance)
    finally:
        unfuse(model)


def _reloaded(
    model: nn.Module,
    name: str,
    folder: Path,
    attached: list[Tensor],
    batches: Sequence[Any],
    tolerance: float,
) -> Comparison:
    from plait.adapter.formats import load

    label, trial = f"reloaded from {folder.name}/", "plait-parity"
    try:
        again = load(model, folder, trial)
    except PlaitError as e:
        return Comparison(label, None, note=str(e))
    try:
        note = "" if name == "plait" else f"as {again.method.name}"
        return _comparison(label, attached, _logits(model, batches), tolerance, note)
    finally:
        detach(model, trial)


@torch.no_grad()
def _logits(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    device = next(model.parameters()).device
    found = []
    for batch in batches:
        inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        found.append(model(**inputs).logits.float().cpu())
    return found


def _comparison(
    name: str, first: list[Tensor], second: list[Tensor], tolerance: float, note: str = ""
) -> Comparison:
    pairs = list(zip(first, second, strict=True))
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    same = [(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in pairs]
    return Comparison(name, difference, tolerance, note, float(torch.cat(same).double().mean()))
