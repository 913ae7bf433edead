"""EVA: A reads the directions in which a site's inputs vary most, and ranks go where they explain.

    X [tokens, in] ~ U S V^T      A = V_r^T      B = 0      share of component i: S_i^2 / |X|^2

The SVD of each site's inputs grows batch by batch until its components stop turning (cosine to the
update before at least `tau`). Of the `rho` r leading components of all n sites, the n r that
explain the largest shares are kept: a site's rank is how many of its own are among them, and a site
with none is left out. alpha follows the rank, so that the scaling stays as configured. B = 0, so
that training starts at the base model. Inputs are not centred, and sites that read the same tensor
share one SVD.
Works with any method that trains a pair. Needs data for a forward pass. Sites that read tokens
(embeddings) or many inputs (packed experts) keep the method's own start and the rank asked for.
Paper: Paischer et al., 2024, arXiv 2410.07170. Parameters: r_l (in + out) a site, sum r_l <= n r.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from plait.adapter import Delta, Initializer, Method, Site
from plait.errors import PlaitError
from plait.initializers._pairs import require_pair
from plait.linalg import best_components
from plait.methods.lora import METHOD as LORA
from plait.methods.lora import LoraDelta, LoraOptions
from plait.statistics import InputSVD, Sketch, activation_pass


@dataclass
class Eva(Initializer):
    rho: float = 2.0
    """A site may get up to rho times the rank asked for; 1 gives every site the same rank."""
    tau: float = 0.99
    """Cosine between a component and its predecessor from which it counts as converged."""
    whiten: bool = False
    """Divide A's rows by their singular values (over the root of the token count)."""
    ignore_unlabelled: bool = True
    """Leave out tokens whose label is -100, as well as padding."""

    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})

    def __post_init__(self) -> None:
        if self.rho < 1 or not 0 < self.tau <= 1:
            raise PlaitError(
                f"eva: rho is at least 1 and tau in (0, 1], not {self.rho} and {self.tau}."
            )

    def collect(
        self, model: nn.Module, sites: Sequence[Site], data: Iterable[Any] | None, rank: int
    ) -> dict[str, Any]:
        reading = [s for s in sites if s.kind in ("linear", "conv")]
        if not reading:
            return {}
        reduce = InputSVD(round(self.rho * rank), tau=self.tau)
        return dict(
            activation_pass(
                model, reading, data or (), reduce, ignore_unlabelled=self.ignore_unlabelled
            )
        )

    def ranks(self, sites: Sequence[Site], statistics: dict[str, Any], rank: int) -> dict[str, int]:
        return redistribute(statistics, rank * len(statistics)) if statistics else {}

    def start(self, delta: Delta, statistics: Sketch | None) -> None:
        pair = require_pair(delta, "eva")
        if statistics is None:
            return
        A = statistics.components[: pair.rank]
        if self.whiten:
            spread = statistics.singular_values[: pair.rank] / max(statistics.count, 1) ** 0.5
            A = A / spread.clamp_min(torch.finfo(A.dtype).tiny)[:, None]
        pair.set_pair(A, torch.zeros_like(pair.B))


def redistribute(sketches: dict[str, Sketch], total: int) -> dict[str, int]:
    """{path: rank}: how many of the `total` most explaining components each site has."""
    if not any(len(s.components) for s in sketches.values()):
        raise PlaitError("eva: the data reached none of the sites; give batches with tokens.")
    best = best_components({path: s.explained for path, s in sketches.items()}, total)
    return {path: int(mask.sum()) for path, mask in best.items()}


METHOD = Method(
    name="eva",
    title="EVA: explained variance adaptation",
    paper="Paischer et al., 2024, arXiv 2410.07170",
    axis="initialisation",
    options=LoraOptions,
    delta=LoraDelta,
    count=LORA.count,
    initializer=Eva,
)
