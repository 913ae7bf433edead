"""`MergedSpace`: weights and densities by group of sites, for merges that are no weighted sum.

    raw z [2 k, g] ──► w [k, g], d [k, g] ──► plait.merge(..., "layered") ──► one adapter, active

A point costs a merge of the adapters and a forward with what came out; the adapters themselves stay
attached and untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import Adapter, activate, adapters, detach
from plait.adapter.attaching import bind, install
from plait.adapter.weighting import Weight
from plait.errors import PlaitError
from plait.merging.driver import merge
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.found import Found
from plait.merging.search.groups import Grouping

LABEL = "merged-trial"


class MergedSpace(Coefficients):
    """Rows 0 .. k - 1 of a point are the adapters' weights, rows k .. 2 k - 1 their densities.

    Args:
        inner: a merge method with the option `density` for each input ("ties", "dare-ties").
        start: the weights' (see `Coefficients`). bounds: of the weights.
        density: at the start. least: of densities, which end at 1.
        options: the inner method's own. seed: of one that draws.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        inner: str,
        *,
        grouping: Grouping | Callable[[str], str],
        bounds: tuple[float, float],
        start: float | None = None,
        density: float = 0.5,
        least: float = 0.1,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < least <= density <= 1 or least == 1:
            raise PlaitError("densities: 0 < least <= start <= 1, and least below 1.")
        self._sides = 1
        super().__init__(model, names, grouping=grouping, start=start, bounds=bounds)
        self._sides = 2
        self.inner, self.least, self.seed = inner, least, seed
        self.options = dict(options or {})
        low, high = bounds
        raw = low + (density - least) / (1 - least) * (high - low)
        self.start = torch.cat([self.start, torch.full_like(self.start, raw)])

    @property
    def shape(self) -> tuple[int, int]:
        return self._sides * len(self.names), len(self.groups)

    def values(self, raw: Tensor) -> Tensor:
        """Weights and densities [2 k, g] of raw z; both lie within the bounds there."""
        assert self.bounds is not None
        k, (low, high) = len(self.names), self.bounds
        share = (raw[k:] - low) / (high - low)
        return torch.cat([raw[:k], self.least + (1 - self.least) * share])

    def weights(self, coefficients: Tensor) -> list[dict[str, Weight]]:
        return super().weights(coefficients[: len(self.names)])

    def described_weights(self, coefficients: Tensor) -> dict[str, dict[str, Any]]:
        return super().described_weights(coefficients[: len(self.names)])

    def described(self) -> dict:
        own = {"inner": self.inner, "least": self.least, "options": self.options}
        return super().described() | own | {"seed": self.seed}

    def arguments(self, coefficients: Tensor) -> dict[str, Any]:
        """What `plait.merge` takes beside the adapters."""
        columns = coefficients[len(self.names) :].T.tolist()
        sites = {path: {"density": columns[part.groups[0]]} for path, part in self.parts.items()}
        return {
            "method": "layered",
            "weights": self.weights(coefficients),
            "inner": self.inner,
            "options": self.options,
            "sites": sites,
            "seed": self.seed,
        }

    def merged(self, coefficients: Tensor, **more: Any) -> Adapter:
        return merge(self.adapters, **self.arguments(coefficients.detach().cpu()), **more)

    def use(self, coefficients: Tensor) -> None:
        """Merge at this point, and make the result the only active adapter."""
        self.drop()
        made = self.merged(coefficients, name=LABEL)
        install(self.model, bind(made, self.model), train=False)

    def drop(self) -> None:
        """Take the last point's merge off the model."""
        if LABEL in adapters(self.model):
            detach(self.model, LABEL)

    @contextmanager
    def searching(self) -> Iterator[None]:
        with super().searching():
            try:
                yield
            finally:
                activate(self.model, {})
                self.drop()


@dataclass(frozen=True)
class FoundMerge(Found):
    """`coefficients` [2 k, g]: weights, then densities (see `MergedSpace`)."""

    @property
    def summed(self) -> bool:
        return False

    def merged(
        self, name: str = "merged", rank: int | None = None, energy: float | None = None
    ) -> Adapter:
        """What was active at this point, as one plain LoRA."""
        assert isinstance(self.space, MergedSpace)
        return self.space.merged(self.coefficients, name=name, rank=rank, energy=energy)
