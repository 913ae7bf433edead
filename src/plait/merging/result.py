"""What a merge builds up, site by site, and its end as a plain LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from plait.adapter import Adapter, Site
from plait.adapter.convert import lora_from
from plait.linalg import LowRank


@dataclass
class Result:
    """The merged sites so far, with the energy that was dropped at each."""

    sites: list[Site] = field(default_factory=list)
    lows: dict[str, LowRank] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    dropped: dict[str, float] = field(default_factory=dict)
    lost: float = 0.0
    total: float = 0.0

    def add(
        self, site: Site, low: LowRank, dropped: float, square: float, bias: Tensor | None
    ) -> None:
        """One merged site; `square` is its squared norm before the cut that dropped a share."""
        self.sites.append(site)
        self.lows[site.path], self.dropped[site.path] = low, dropped
        self.lost, self.total = self.lost + dropped * square, self.total + square
        if bias is not None:
            self.biases[site.path] = bias

    @property
    def dropped_energy(self) -> float:
        """The share of the whole merge's squared norm that was dropped."""
        return self.lost / self.total if self.total else 0.0

    def adapter(self, name: str, info: dict[str, Any]) -> Adapter:
        """A LoRA of scaling 1 whose changes are the sites added."""
        info = {**info, "dropped_energy": self.dropped}
        return lora_from(name, self.sites, self.lows, self.biases, info=info)
