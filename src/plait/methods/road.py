"""RoAd: a layer's outputs, taken in pairs, are rotated and stretched.

    x ──► W, b ──► pairs (y_1, y_2) ──►  a cos(t) y_1 - a sin(t) y_2
                                         a sin(t) y_1 + a cos(t) y_2

Outputs come in groups, and output k of a group's first half is paired with output k of its second.
`variant` says how many angles t and scales a a pair has: one of each, one for each row of the 2 x 2
matrix, or one for each entry. a = 1 and t = 0 at the start, where the model is the base. dW =
(R - I) W with a bias change (R - I) b; forward is element-wise work on y, and a batch of requests
may mix adapters. Two active adapters add their changes.
Paper: Liao, Monz, 2024, arXiv 2409.00119. Parameters: variant * out a site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter import Delta, Method, Options, PeftCodec, Site, Traits, per_site
from plait.adapter.choices import check_choices
from plait.adapter.formats.peft_codec import one_value
from plait.errors import PlaitError
from plait.methods._pairwise import turn_pairs, turned
from plait.methods._peft_plain import refuse_transposed


@dataclass(frozen=True)
class RoadOptions(Options):
    variant: Literal[1, 2, 4] = 1
    """Angles (and scales) of a pair; 1 is a rotation times a number."""
    group_size: int = 64
    """Outputs in a group, an even number that divides a site's outputs; 64 is what fast serving
    wants, and which outputs are paired hardly matters otherwise."""

    def __post_init__(self) -> None:
        check_choices(self, "road")
        if self.group_size < 2 or self.group_size % 2:
            raise PlaitError(f"group_size must be even and at least 2, not {self.group_size}.")

    def numbers(self, site: Site) -> int:
        """How many angles there are at a site, and as many scales."""
        if site.out_features % self.group_size:
            raise PlaitError(
                f"road: group_size={self.group_size} does not divide the {site.out_features} "
                f"outputs of {site.path!r}; set another there with overrides=."
            )
        return self.variant * site.out_features // 2


class RoadDelta(Delta):
    traits = Traits(depends_on_base=True, reads_output=True, changes_bias=True)
    options: RoadOptions
    theta: Tensor
    alpha: Tensor

    def build(self) -> None:
        numbers = self.options.numbers(self.site)
        self.parameter("theta", numbers)
        self.parameter("alpha", numbers)

    def reset(self) -> None:
        torch.nn.init.ones_(self.alpha)

    def columns(self) -> tuple[Tensor, Tensor]:
        """c and d [out]: y becomes y + c y + d turned(y)."""
        half = self.options.group_size // 2
        # One line of `half` numbers for both halves of a group, one for each, or one for each entry
        # (first what multiplies y, then what multiplies its partner, by half).
        theta, alpha = (t.view(-1, self.options.variant, half) for t in (self.theta, self.alpha))
        if self.options.variant == 1:
            theta, alpha = theta.expand(-1, 2, -1), alpha.expand(-1, 2, -1)
        # cos(t) - 1 as -2 sin(t / 2)^2: small angles are lost beside 1.
        a, t = alpha[:, :2], theta[:, :2]
        c = (a - 1) - 2 * a * (t / 2).sin().square()
        d = alpha[:, -2:] * theta[:, -2:].sin()
        return c.flatten(), d.flatten()

    def dense(self) -> Tensor:
        return self._change(self.base_weight().t()).t()

    def bias(self) -> Tensor | None:
        bias = self.site.bias()
        return None if bias is None else self._change(bias.detach().to(self.theta.dtype))

    def _change(self, y: Tensor) -> Tensor:
        c, d = (t.to(y.dtype) for t in self.columns())
        return c * y + d * turned(y, self.options.group_size)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self._change(self.site.forward(x) if y is None else y)

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        y = self.site.forward(*args, **kwargs)
        return turn_pairs(y, *self.columns(), self.options.group_size)


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    refuse_transposed(deltas, "RoAd")
    variant = f"road_{one_value(deltas, 'variant')}"
    return {"variant": variant, "group_size": one_value(deltas, "group_size")}


METHOD = Method(
    name="road",
    title="RoAd: rotation adaptation",
    paper="Liao, Monz, 2024, arXiv 2409.00119",
    axis="parameterisation",
    options=RoadOptions,
    delta=RoadDelta,
    count=per_site(lambda site, o: 2 * o.numbers(site)),
    peft=PeftCodec(
        type="ROAD",
        keys={"theta": "road_theta", "alpha": "road_alpha"},
        options=lambda found: {
            "variant": int(str(found.config.get("variant", "road_1")).removeprefix("road_")),
            "group_size": found.config.get("group_size", 64),
        },
        config=_config,
        settings=("variant", "group_size"),
    ),
    example={"group_size": 2},
)
