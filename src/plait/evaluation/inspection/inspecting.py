"""`inspect_adapters`: adapters site by site, alone, beside each other and beside their base."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Adapter, Delta
from plait.adapter.formats import read_adapter
from plait.adapter.formats.files import PARTS, SINGLE
from plait.errors import FormatError, PlaitError
from plait.evaluation.inspection.base import Base, BaseWeights, open_base
from plait.evaluation.inspection.health import check_adapter, check_base, check_siblings
from plait.evaluation.inspection.intruders import (
    EXTRA,
    IntruderSearch,
    Leading,
    find_intruders,
    leading_vectors,
)
from plait.evaluation.inspection.measure import measure_site
from plait.evaluation.inspection.report import AdapterReport, SiteReport
from plait.evaluation.inspection.savings import find_savings
from plait.evaluation.inspection.similarity import Change, Pair, Similarities
from plait.evaluation.progress import bar
from plait.evaluation.results import finite

Given = Adapter | str | os.PathLike[str]


@dataclass
class Inspection:
    """One report an adapter, and one `Pair` for every two of them."""

    reports: list[AdapterReport]
    pairs: list[Pair] = field(default_factory=list)
    base: str | None = None
    search: IntruderSearch | None = None

    def problems(self) -> list[str]:
        """Every adapter's problems; with several adapters, each behind its adapter's name."""
        several = len(self.reports) > 1
        return [f"{r.name}: {p}" if several else p for r in self.reports for p in r.problems()]

    def failing(self, allow: Sequence[str] = ()) -> list[str]:
        """The problems of all checks but those allowed."""
        several = len(self.reports) > 1
        found = [(r, f) for r in self.reports for f in r.findings if f.check not in allow]
        return [f"{r.name}: {f.message}" if several else f.message for r, f in found]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite are None."""
        return finite(
            {
                "base": self.base,
                "intruder_search": None if self.search is None else asdict(self.search),
                "adapters": [report.as_dict() for report in self.reports],
                "pairs": [asdict(pair) for pair in self.pairs],
            }
        )

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, default=str, allow_nan=False)


@torch.no_grad()
def inspect_adapters(
    given: Sequence[Given],
    base: Base | None = None,
    *,
    entropy: bool = False,
    intruders: IntruderSearch | None = None,
    progress: bool = False,
) -> Inspection:
    """Measure adapters at every site, compare them, and look for damage.

    Args:
        given: adapters, or where they lie; several are compared with each other.
        base: a model, or a checkpoint's folder (read one site at a time). Gives norms relative to W
            and intruders, says whether it is the base that the adapters were made for, and serves
            methods whose change depends on W.
        entropy: add entanglement profiles.
        intruders: look for intruder dimensions (needs weights: a base, or attached adapters).
        progress: show a bar on stderr.

    Changes with factors are measured in factor space, others by a dense SVD of each site. Nothing
    is modified. Raises FormatError for a file that cannot be read.
    """
    with open_base(base) as weights:
        adapters = [_read(each, weights) for each in given]
        if not adapters:
            raise PlaitError("there is nothing to inspect; give at least one adapter.")
        labels = _labels(adapters, given)
        work = _Work(adapters, labels, weights, entropy, intruders)
        paths = list(dict.fromkeys(path for a in adapters for path in a.deltas))
        with bar("inspecting", len(paths), progress) as advance:
            for path in paths:
                work.site(path)
                advance(1)
        reports = [
            _report(adapter, label, source, sites, weights)
            for adapter, label, source, sites in zip(
                adapters, labels, given, work.sites, strict=True
            )
        ]
        for report, more in zip(reports, check_siblings(reports), strict=True):
            report.findings += more
        label = None if weights is None else weights.label
        return Inspection(reports, work.similarities.pairs(), label, intruders)


def inspect_adapter(
    adapter: Given,
    base: Base | None = None,
    *,
    entropy: bool = False,
    intruders: IntruderSearch | None = None,
    progress: bool = False,
) -> AdapterReport:
    """The report of a single adapter; see `inspect_adapters`."""
    found = inspect_adapters(
        [adapter], base, entropy=entropy, intruders=intruders, progress=progress
    )
    return found.reports[0]


@dataclass
class _Work:
    """Goes through the sites, so that each weight is read once for all adapters."""

    adapters: list[Adapter]
    labels: list[str]
    base: BaseWeights | None
    entropy: bool
    search: IntruderSearch | None
    sites: list[list[SiteReport]] = field(init=False)
    similarities: Similarities = field(init=False)

    def __post_init__(self) -> None:
        self.sites = [[] for _ in self.adapters]
        self.similarities = Similarities(self.labels)

    def site(self, path: str) -> None:
        weights: dict[tuple[int, ...], Tensor | None] = {}
        known: dict[tuple[int, ...], Leading] = {}
        changes: list[Change | None] = []
        for adapter, sites in zip(self.adapters, self.sites, strict=True):
            delta = adapter.deltas.get(path)
            if delta is None:
                changes.append(None)
                continue
            shape = tuple(delta.site.shape)
            if shape not in weights:
                weights[shape] = self._weight(delta)
            report, change = self._measured(delta, weights[shape])
            sites.append(report)
            changes.append(change)
            if self.search is not None:
                self._intruders(report, change, weights[shape], known)
        if len(self.adapters) > 1:
            self.similarities.add(path, changes)

    def _weight(self, delta: Delta) -> Tensor | None:
        if delta.site.kind == "module":
            return None
        if self.base is not None:
            return self.base.weight(delta.site)
        return None if delta.site.module is None else delta.site.weight().detach()

    def _measured(self, delta: Delta, weight: Tensor | None) -> tuple[SiteReport, Change | None]:
        fits = self.base is not None and weight is not None and delta.traits.depends_on_base
        if not fits or self.base is None:
            return measure_site(delta, self.entropy, weight)
        try:
            return measure_site(self.base.placed(delta), self.entropy, weight)
        except (AttributeError, RuntimeError, PlaitError) as e:
            report, _ = measure_site(delta, self.entropy, weight)
            report.note = f"needs the loaded base model ({' '.join(str(e).split())[:80]})"
            return report, None

    def _intruders(
        self,
        report: SiteReport,
        change: Change | None,
        weight: Tensor | None,
        known: dict[tuple[int, ...], Leading],
    ) -> None:
        if self.search is None or change is None or weight is None or weight.dim() != 2:
            return
        if report.is_zero or not weight.is_floating_point():
            return
        if report.shape not in known:
            known[report.shape] = leading_vectors(weight, self.search.top + EXTRA)
        report.intruders = find_intruders(weight, change, self.search, known[report.shape])


def _report(
    adapter: Adapter,
    label: str,
    source: Given,
    sites: list[SiteReport],
    base: BaseWeights | None,
) -> AdapterReport:
    tensors = adapter.state_dict()
    path = None if isinstance(source, Adapter) else Path(source)
    report = AdapterReport(
        name=label,
        method=adapter.method.name,
        parameters=adapter.num_parameters(),
        stored=sum(t.numel() for t in tensors.values()),
        bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        info=dict(adapter.info),
        sites=sites,
        source="" if path is None else str(path),
        file_bytes=None if path is None else _size(path),
        base=None if base is None else base.label,
        not_finite=_not_finite(tensors),
    )
    report.findings = check_adapter(report)
    if base is not None:
        against = check_base(report, base)
        report.findings += against
        wrong = any(f.check == "wrong-base" for f in against)
        told = report.fingerprint is not None and base.fingerprint is not None
        report.fits_base = False if wrong else True if told else None
    report.savings = find_savings(report, adapter)
    return report


def _not_finite(tensors: dict[str, Tensor]) -> dict[str, int]:
    counts = {
        n: int((~torch.isfinite(t)).sum()) for n, t in tensors.items() if t.is_floating_point()
    }
    return {name: count for name, count in counts.items() if count}


def _read(given: Given, base: BaseWeights | None) -> Adapter:
    if isinstance(given, Adapter):
        return given
    path = Path(given)
    model = None if base is None else base.model
    with warnings.catch_warnings():
        # The report says where, and of all of them.
        warnings.filterwarnings("ignore", message=".*holds NaN or infinity")
        try:
            adapter = read_adapter(path)
        except FormatError:
            if model is None:
                raise
            return read_adapter(path, model=model)
        if base is None or any(base.holds(site) for site in adapter.deltas):
            return adapter
        # Formats with names of their own tell where they act only beside the model.
        with contextlib.suppress(PlaitError, NotImplementedError):
            return read_adapter(path, model=model)
    return adapter


def _size(path: Path) -> int:
    """Bytes of the adapter's own files; what else lies in its folder does not count."""
    if path.is_file() and path.name not in PARTS:
        return path.stat().st_size
    folder = path if path.is_dir() else path.parent
    files = (folder / name for name in {*PARTS, SINGLE})
    return sum(f.stat().st_size for f in files if f.is_file())


def _labels(adapters: Sequence[Adapter], given: Sequence[Given]) -> list[str]:
    """The adapters' names; where two are called alike, what tells their paths apart."""
    names = [adapter.name for adapter in adapters]
    found: list[str] = []
    for name, source in zip(names, given, strict=True):
        label = name
        if names.count(name) > 1 and not isinstance(source, Adapter):
            label = str(source)
        found.append(label if label not in found else f"{label} ({len(found) + 1})")
    return found
