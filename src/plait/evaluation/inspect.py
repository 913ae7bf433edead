"""`inspect_adapter`: what an adapter changes, how much, in how many directions; is it sound?"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import Adapter, Delta, adapters, bind, block_index, detach, install
from plait.errors import PlaitError
from plait.linalg import LowRank, entropy_profile

ENERGIES = (0.9, 0.99, 0.999)
DEAD = 1e-6
"""A component is dead when its norm is below this share of the site's largest."""


@dataclass
class SiteReport:
    """One site. What cannot be told (no dW, no base at hand, NaN) is None; then `note` says why.

    `norm` is Frobenius, `relative_norm` that over ||W||, `spectral_norm` the largest singular
    value; `stable_rank` = norm^2 / spectral^2; `effective_rank` = exp(entropy of the singular
    values' shares); `energy` {k: share of norm^2 in the first k}, `ranks` {share: components that
    hold it}. Packed experts are taken together: pooled norms and energies, the mean of the ranks.
    `entropy`, where asked for, is the entanglement entropy in nats across every cut of a chain of
    the prime factors of out and in (see `plait.linalg.entropy_profile`).
    """

    path: str
    layer: int | None
    module: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    rank: int | None = None
    norm: float | None = None
    relative_norm: float | None = None
    spectral_norm: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    singular_values: list[float] = field(default_factory=list)
    energy: dict[int, float] = field(default_factory=dict)
    ranks: dict[float, int] = field(default_factory=dict)
    entropy: list[float] = field(default_factory=list)
    not_finite: int = 0
    dead_components: int = 0
    note: str = ""

    @property
    def is_zero(self) -> bool:
        return self.norm == 0


@dataclass
class AdapterReport:
    """A whole adapter; `bytes` is what its stored tensors take in memory."""

    name: str
    method: str
    parameters: int
    stored: int
    bytes: int
    info: dict[str, Any]
    sites: list[SiteReport]

    @property
    def norm(self) -> float:
        """The Frobenius norm of all changes together."""
        return sum((s.norm or 0.0) ** 2 for s in self.sites) ** 0.5

    def problems(self) -> list[str]:
        """What is wrong with it, in plain words; empty for a sound adapter."""
        found = []
        damaged = [s for s in self.sites if s.not_finite]
        if damaged:
            count = sum(s.not_finite for s in damaged)
            found.append(f"{count} values are NaN or infinite, at {_some(damaged)}")
        zero = [s for s in self.sites if s.is_zero]
        if zero and len(zero) == len(self.sites):
            found.append("every change is zero: the adapter does nothing (was it trained?)")
        elif zero:
            found.append(f"the change is zero at {_some(zero)}")
        dead = [s for s in self.sites if s.dead_components and not s.is_zero]
        if dead:
            count = sum(s.dead_components for s in dead)
            found.append(f"{count} rank components do nothing, at {_some(dead)}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**dataclasses.asdict(self), "norm": self.norm, "problems": self.problems()}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, default=str)


def _some(sites: list[SiteReport]) -> str:
    shown = ", ".join(s.path for s in sites[:3])
    return shown + (f" and {len(sites) - 3} more sites" if len(sites) > 3 else "")


@torch.no_grad()
def inspect_adapter(
    adapter: Adapter,
    base: nn.Module | None = None,
    *,
    entropy: bool = False,
    progress: bool = False,
) -> AdapterReport:
    """Measure every site of an adapter.

    `base`, a model, gives the norms relative to W, and serves methods whose change depends on W;
    an adapter that is attached has its base already. Changes with factors are measured in factor
    space, others by a dense SVD of each site. `entropy` adds entanglement profiles, `progress`
    shows a bar on stderr. Nothing is modified.
    """
    with _attached(adapter, base):
        tracked = _tracked(adapter.deltas.values(), progress)
        sites = [_inspect_site(delta, entropy) for delta in tracked]
        tensors = adapter.state_dict().values()
        return AdapterReport(
            name=adapter.name,
            method=adapter.method.name,
            parameters=adapter.num_parameters(),
            stored=sum(t.numel() for t in tensors),
            bytes=sum(t.numel() * t.element_size() for t in tensors),
            info=dict(adapter.info),
            sites=sites,
        )


@contextlib.contextmanager
def _attached(adapter: Adapter, base: nn.Module | None) -> Iterator[None]:
    if base is None or adapter.model is not None:
        yield
        return
    if adapter.name in adapters(base):
        raise PlaitError(f"the base carries an adapter {adapter.name!r} already; detach it first.")
    trains = [p.requires_grad for p in adapter.parameters()]
    install(base, bind(adapter, base), activate=False)
    try:
        yield
    finally:
        detach(base, adapter.name)
        for parameter, train in zip(adapter.parameters(), trains, strict=True):
            parameter.requires_grad_(train)


def _inspect_site(delta: Delta, entropy: bool) -> SiteReport:
    site = delta.site
    tensors = [t for _, t in delta.own_tensors() if t.is_floating_point()]
    report = SiteReport(
        path=site.path,
        layer=block_index(site.path),
        module=site.path.rpartition(".")[2],
        kind=site.kind,
        shape=tuple(site.shape),
        parameters=sum(p.numel() for p in delta.parameters()),
        not_finite=int(sum((~torch.isfinite(t)).sum() for t in tensors)),
    )
    if report.not_finite:
        report.note = "holds NaN or infinity"
    elif not delta.traits.linear_in_x:
        report.note = "is not linear in its input, so there is no dW to measure"
    elif delta.traits.depends_on_base and site.module is None:
        report.note = "depends on the base weight; give the base model"
    else:
        _measure(report, delta)
        if entropy and len(site.shape) == 2 and not report.is_zero:
            low = delta.factors()
            change = low if low is not None else _matrix(delta.dense())
            report.entropy = entropy_profile(change).tolist()
    return report


def _measure(report: SiteReport, delta: Delta) -> None:
    low = delta.factors()
    if low is not None:
        report.rank = low.rank
        report.dead_components = _dead(low)
        S = low.singular_values()
    else:
        S = torch.linalg.svdvals(_matrix(delta.dense()).float())
    _fill_spectrum(report, S.double().cpu())
    if delta.site.module is not None and delta.site.kind != "module":
        weight = torch.linalg.vector_norm(delta.site.weight().float())
        report.relative_norm = report.norm / float(weight) if weight and report.norm else 0.0


def _matrix(dense: Tensor) -> Tensor:
    return dense if dense.dim() >= 2 else dense.unsqueeze(0)


def _dead(low: LowRank) -> int:
    norms = torch.linalg.vector_norm(low.B.float(), dim=-2) * torch.linalg.vector_norm(
        low.A.float(), dim=-1
    )
    return int((norms <= DEAD * norms.max()).sum()) if norms.numel() else 0


def _fill_spectrum(report: SiteReport, S: Tensor) -> None:
    """From the singular values [..., k], descending."""
    squares = S.square()
    pooled = squares.flatten(0, -2).sum(0) if S.dim() > 1 else squares
    total = float(pooled.sum())
    report.norm = total**0.5
    report.spectral_norm = float(S.max()) if S.numel() else 0.0
    report.singular_values = pooled.sqrt().tolist()
    if total == 0:
        report.stable_rank = report.effective_rank = 0.0
        return
    alive = S.flatten(0, -2) if S.dim() > 1 else S.unsqueeze(0)
    alive = alive[alive.sum(-1) > 0]
    report.stable_rank = float((alive.square().sum(-1) / alive[:, 0].square()).mean())
    shares = alive / alive.sum(-1, keepdim=True)
    report.effective_rank = float(torch.exp(-torch.xlogy(shares, shares).sum(-1)).mean())
    held = pooled.cumsum(0) / total
    steps = [2**i for i in range(16) if 2**i < len(held)] + [len(held)]
    report.energy = {k: float(held[k - 1].clamp_max(1)) for k in steps}
    report.ranks = {share: int((held < share - 1e-12).sum()) + 1 for share in ENERGIES}


def _tracked(deltas: Iterable[Delta], progress: bool) -> Iterable[Delta]:
    if not progress:
        return deltas
    from rich.console import Console
    from rich.progress import track

    return track(list(deltas), "inspecting", console=Console(stderr=True), transient=True)
