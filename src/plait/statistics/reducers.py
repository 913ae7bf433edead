"""What `activation_pass` can make of a site's inputs, in memory that does not grow with data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from plait.linalg import randomized_svd


class Reduction(Protocol):
    """The running state of one site."""

    done: bool
    """More data would not change the result; a pass stops once every reduction is done."""

    def update(self, x: Tensor) -> None:
        """Take in x [tokens, in]."""

    def result(self) -> Any:
        """The statistic, on the CPU."""


@dataclass
class SecondMoment:
    """Reducer: X^T X / N [in, in], float32 on the CPU; the covariance with `center`.

    Memory in^2 a distinct input. Sums run in float32 at least, where half precision would overflow.
    """

    center: bool = False

    def __call__(self, width: int) -> Reduction:
        return _Moment(width, self.center)


class _Moment:
    done = False

    def __init__(self, width: int, center: bool) -> None:
        self.center, self.count, self.width = center, 0, width
        self.total: Tensor | None = None
        self.sum: Tensor | None = None

    def update(self, x: Tensor) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.total is None or self.sum is None:
            self.total = x.new_zeros(self.width, self.width)
            self.sum = x.new_zeros(self.width)
        self.total.addmm_(x.t(), x)
        self.sum += x.sum(0)
        self.count += len(x)

    def result(self) -> Tensor:
        if self.total is None or self.sum is None:
            return torch.zeros(self.width, self.width)
        moment = self.total / max(self.count, 1)
        if self.center:
            mean = self.sum / self.count
            moment -= torch.outer(mean, mean)
        return moment.to("cpu", torch.float32)


@dataclass(frozen=True)
class Sketch:
    """The leading right singular structure of all inputs X [N, in] of a site."""

    components: Tensor
    """[k, in], orthonormal rows, the strongest first."""
    singular_values: Tensor
    """[k], descending."""
    energy: float
    """||X||_F^2, of which each squared singular value is a share."""
    count: int
    """N."""

    @property
    def explained(self) -> Tensor:
        """[k]: the share of the energy that each component explains."""
        return self.singular_values.square() / max(self.energy, torch.finfo(torch.float64).tiny)


@dataclass
class InputSVD:
    """Reducer: truncated SVD of the inputs, updated batch by batch, as a `Sketch`.

    Each update takes the SVD of the kept components, times their singular values, on top of the new
    rows, and keeps the strongest `rank + oversample`. Memory O((rank + oversample) in). With `tau`,
    a site is done when every one of its `rank` components has cosine at least tau with its
    predecessor of the update before (EVA's test of convergence).
    """

    rank: int
    oversample: int = 8
    tau: float | None = None
    power_iterations: int = 4
    """Of each update's randomised SVD: activations' spectra decay slowly."""
    seed: int = 0

    def __call__(self, width: int) -> Reduction:
        return _Incremental(self, width)


@dataclass
class _Incremental:
    options: InputSVD
    width: int
    done: bool = False
    energy: float = 0.0
    count: int = 0
    values: Tensor | None = None
    vectors: Tensor | None = field(default=None, repr=False)

    def update(self, x: Tensor) -> None:
        if self.done or len(x) == 0:
            return
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.energy += float(x.square().sum(dtype=torch.float64))
        self.count += len(x)
        rows = x
        if self.values is not None and self.vectors is not None:
            rows = torch.cat([self.values[:, None] * self.vectors, x])
        o = self.options
        keep = min(o.rank + o.oversample, *rows.shape)
        _, S, Vh = randomized_svd(
            rows, keep, oversample=0, power_iterations=o.power_iterations, seed=o.seed
        )
        before, self.values, self.vectors = self.vectors, S, Vh
        self.done = self._converged(before)

    def _converged(self, before: Tensor | None) -> bool:
        rank, tau = min(self.options.rank, self.width), self.options.tau
        if tau is None or before is None or self.vectors is None or len(before) < rank:
            return False
        cosines = (before[:rank] * self.vectors[:rank]).sum(1).abs()
        return bool((cosines >= tau).all())

    def result(self) -> Sketch:
        if self.values is None or self.vectors is None:
            return Sketch(torch.zeros(0, self.width), torch.zeros(0), 0.0, 0)
        rank = self.options.rank
        return Sketch(
            self.vectors[:rank].to("cpu", torch.float32),
            self.values[:rank].to("cpu", torch.float32),
            self.energy,
            self.count,
        )
