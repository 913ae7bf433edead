"""What an inspection found: numbers by site, by adapter, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from plait.evaluation.results import finite

CHECKS = {
    "not-finite": "values that are NaN or infinite",
    "zero": "sites, or a whole adapter, that change nothing",
    "dead-ranks": "rank components that do nothing",
    "outlier": "a site far larger than its kind, its layer and its neighbours say",
    "outweighs": "a change larger than the weight it changes",
    "wrong-base": "a fingerprint, or sites and shapes, of another base",
    "scale": "a whole adapter larger than its siblings, or with another scaling",
}
"""What is looked for: the names that `--allow` takes."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: which check, in plain words, and the sites where it shows."""

    check: str
    message: str
    sites: tuple[str, ...] = ()


@dataclass(frozen=True)
class Intruders:
    """Of the `looked` leading left singular vectors of W + dW, those that no singular vector of W
    resembles (every |cosine| below the threshold): `indices` (0 the greatest), and `cosines`, the
    best match of every vector looked at. `exact` says whether all of W's vectors were compared, or
    only the leading ones where more would not have changed the answer or could not be afforded."""

    looked: int
    indices: list[int]
    cosines: list[float]
    exact: bool

    @property
    def count(self) -> int:
        return len(self.indices)


@dataclass
class SiteReport:
    """One site. What cannot be told (no dW, no base at hand, NaN) is None; then `note` says why.

    `norm` is Frobenius, `relative_norm` that over ||W||, `spectral_norm` the largest singular
    value, `nuclear_norm` their sum; `stable_rank` = norm^2 / spectral^2; `effective_rank` =
    exp(entropy of the singular values' shares); `energy` {k: share of norm^2 in the first k},
    `ranks` {share: components that hold it}. Packed experts are taken together: pooled norms and
    energies, the mean of the ranks. `entropy`, where asked for, is the entanglement entropy in nats
    across every cut of a chain of the prime factors of out and in (see
    `plait.linalg.entropy_profile`), `valley` how far it drops at the cut between rows and columns
    below the lower of the two greatest values on its sides (0 without a drop). `reach` stands
    where factors nearly cancel, as those of a start that is held back: how far equal steps of all
    their entries would move dW (to first order), sqrt(out |A|^2 + in |B|^2).
    """

    path: str
    layer: int | None
    module: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    rank: int | None = None
    scaling: float | None = None
    norm: float | None = None
    relative_norm: float | None = None
    spectral_norm: float | None = None
    nuclear_norm: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    singular_values: list[float] = field(default_factory=list)
    energy: dict[int, float] = field(default_factory=dict)
    ranks: dict[float, int] = field(default_factory=dict)
    entropy: list[float] = field(default_factory=list)
    valley: float | None = None
    reach: float | None = None
    intruders: Intruders | None = None
    not_finite: int = 0
    dead_components: int = 0
    note: str = ""

    @property
    def is_zero(self) -> bool:
        return self.norm == 0


@dataclass(frozen=True)
class Savings:
    """What `plait compress --energy` would leave: `ranks` by site, `bytes` of its tensors."""

    energy: float
    bytes: int
    ranks: dict[str, int]
    command: str


@dataclass
class AdapterReport:
    """A whole adapter; `bytes` is what its stored tensors take in memory, `file_bytes` what its
    files take on disk. `not_finite` counts the bad values of each tensor that holds any."""

    name: str
    method: str
    parameters: int
    stored: int
    bytes: int
    info: dict[str, Any]
    sites: list[SiteReport]
    source: str = ""
    file_bytes: int | None = None
    base: str | None = None
    fits_base: bool | None = None
    not_finite: dict[str, int] = field(default_factory=dict)
    savings: Savings | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def norm(self) -> float:
        """The Frobenius norm of all changes together."""
        return sum((s.norm or 0.0) ** 2 for s in self.sites) ** 0.5

    @property
    def fingerprint(self) -> str | None:
        """Of the base it was trained on, where its file says so."""
        found = self.info.get("base_fingerprint")
        return found if isinstance(found, str) and found else None

    def problems(self) -> list[str]:
        """What is wrong with it, in plain words; empty for a sound adapter."""
        return [finding.message for finding in self.findings]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**dataclasses.asdict(self), "norm": self.norm, "problems": self.problems()}

    def to_json(self) -> str:
        return json.dumps(finite(self.as_dict()), indent=2, default=str, allow_nan=False)
