"""The numbers of one site: norms, ranks and spectrum of its change."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.adapter import Delta, block_index
from plait.evaluation.inspection.report import SiteReport
from plait.linalg import LowRank, all_finite, entropy_profile
from plait.linalg.entanglement import prime_factors

ENERGIES = (0.9, 0.99, 0.999)
DEAD = 1e-6
"""A component is dead when its norm is below this share of the site's largest."""
CANCELLED = 0.2
"""Factors cancel when dW is below this share of what factors of their size make at random."""


def measure_site(
    delta: Delta, entropy: bool = False, weight: Tensor | None = None
) -> tuple[SiteReport, LowRank | Tensor | None]:
    """The report of one site and its change: factors where there are any, else the dense dW.

    `weight` is W, canonical, where it is at hand. A change with factors is measured in factor
    space, another by a dense SVD. The change is None where it cannot be told; `note` says why.
    """
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
    report.note = _obstacle(report, delta)
    if report.note:
        return report, None
    low = delta.factors()
    change = _matrix(delta.dense()) if low is None else low
    if not all_finite(change if isinstance(change, Tensor) else change.norm()):
        report.not_finite, report.note = 1, "its change overflows"
        return report, None
    _measure(report, change)
    if weight is not None and report.norm is not None:
        size = float(torch.linalg.vector_norm(weight.float()))
        report.relative_norm = report.norm / size if size else None
    if entropy and len(site.shape) == 2 and not report.is_zero:
        _measure_entropy(report, change)
    return report, change


def _obstacle(report: SiteReport, delta: Delta) -> str:
    if report.not_finite:
        return "holds NaN or infinity"
    if not delta.traits.linear_in_x:
        return "is not linear in its input, so there is no dW to measure"
    if delta.traits.depends_on_base and delta.site.module is None:
        return "depends on the base weight; give the base model"
    return ""


def _matrix(dense: Tensor) -> Tensor:
    return dense if dense.dim() >= 2 else dense.unsqueeze(0)


def _measure(report: SiteReport, change: LowRank | Tensor) -> None:
    if isinstance(change, LowRank):
        report.rank, report.scaling = change.rank, change.scale
        report.dead_components = _dead(change)
        S = change.singular_values()
    else:
        S = torch.linalg.svdvals(change.float())
    _fill_spectrum(report, S.double().cpu())
    if isinstance(change, LowRank) and change.rank and report.norm:
        report.reach = _reach(change, report.norm)


def _reach(low: LowRank, norm: float) -> float | None:
    A, B = (float(torch.linalg.vector_norm(factor.float())) for factor in (low.A, low.B))
    if norm > CANCELLED * abs(low.scale) * A * B / low.rank**0.5:
        return None
    rows, columns = low.shape[-2:]
    return float((rows * A * A + columns * B * B) ** 0.5)


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
    report.nuclear_norm = float(S.sum())
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


def _measure_entropy(report: SiteReport, change: LowRank | Tensor) -> None:
    profile = entropy_profile(change).tolist()
    middle = len(prime_factors(report.shape[0])) - 1
    left, right = profile[:middle], profile[middle + 1 :]
    report.entropy = profile
    if left and right:
        report.valley = max(0.0, min(max(left), max(right)) - profile[middle])
