"""One site of a bank: what all its adapters share there, and what each has of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from plait.adapter import Site
from plait.adapter.formats.coded import Coded
from plait.linalg import LowRank


@dataclass
class Shelf(ABC):
    """The adapters of one site behind one basis."""

    site: Site

    kind: ClassVar[str]
    """How files name this way of sharing."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The adapters that have a change here."""

    @abstractmethod
    def low(self, name: str) -> LowRank:
        """An adapter's change, as near as it was kept."""

    @abstractmethod
    def fits(self, low: LowRank) -> bool:
        """Whether another adapter's change can be put here."""

    @abstractmethod
    def put(self, name: str, low: LowRank) -> None:
        """Another adapter, as near as the basis comes; the others do not move."""

    @abstractmethod
    def num_parameters(self) -> int:
        """Numbers stored."""

    @abstractmethod
    def stored(self, coded: list[Coded]) -> dict[str, Tensor]:
        """Tensors for the file, by the names after the site's path; tensors in few bits go into a
        group of `coded` instead."""

    def facts(self) -> dict[str, Any]:
        """What the description has to say about this site, beside its path and shape."""
        return {}

    @classmethod
    @abstractmethod
    def read(cls, site: Site, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """From what `stored` and `facts` gave; FormatError where that does not fit together."""
