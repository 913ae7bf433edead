"""What an adapter would take with only the components that hold 99 % of every change."""

from __future__ import annotations

import shlex
from pathlib import Path

from plait.adapter import Adapter
from plait.adapter.replacement import is_extra
from plait.evaluation.inspection.report import AdapterReport, Savings

ENERGY = 0.99
WORTH = 0.95
"""A result above this share of the present size is not worth a command."""


def find_savings(report: AdapterReport, adapter: Adapter) -> Savings | None:
    """The bytes that `plait compress --energy 0.99` leaves in its tensors; None where it does not
    apply (a site without dW, packed experts, damage) or saves less than a twentieth."""
    ranks: dict[str, int] = {}
    total = 0
    by_path = {site.path: site for site in report.sites}
    for path, delta in adapter.deltas.items():
        site, size = by_path[path], delta.dtype.itemsize
        if is_extra(delta):
            total += sum(t.numel() * t.element_size() for _, t in delta.own_tensors())
            continue
        if site.norm is None or len(site.shape) != 2:
            return None
        ranks[path] = site.ranks.get(ENERGY, 0)
        total += ranks[path] * sum(site.shape) * size
        if delta.bias() is not None:
            total += site.shape[0] * size
    if not ranks or total > WORTH * report.bytes:
        return None
    return Savings(ENERGY, total, ranks, _command(report, adapter))


def _command(report: AdapterReport, adapter: Adapter) -> str:
    source = report.source or "ADAPTER"
    out = str(Path(source).with_suffix("")) + "-small" if report.source else "OUT"
    words = ["plait", "compress", source, "--energy", str(ENERGY), "-o", out]
    if any(d.traits.depends_on_base for d in adapter.deltas.values()):
        words += ["--base", report.base or str(report.info.get("base") or "BASE")]
    return shlex.join(words)
