"""MixLoRA: every feed-forward block becomes a mixture of experts that share its frozen weights.

    h ──► router G (N x d), float32 ──► softmax, top k, renormalised ──► w [tokens, N]
    h ──► W_gate, W_up once, and each expert's LoRAs ──► z_e ──► sum_e w_e z_e ──► W_down ──► y

An expert E_e(h) = D_e(act(G_e h) * U_e h) is a set of LoRAs on the block's three linears, and the
block answers sum_e w_e E_e(h): the mixture lies over whole outputs, behind the activation. The base
products are shared: gate and up are computed once, and so is down, because it is linear and can be
applied to the mixed z (the paper's code applies it k times a token). Attention has plain LoRAs.

A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, G ~ N(0, 0.02^2): with weights that sum to 1 training starts
at the base model. With one active expert that weight is the constant 1 and the router learns from
the balance loss alone; `renormalize=False` lets it learn from the task, and gives up that start.
Paper: Li et al., 2024, arXiv 2404.15159. Parameters: N (3 r (d + m) + d) a block, LoRA's elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.adapter import Context, Delta, Method, PairDelta, PairOptions, Site, Traits, find_sites
from plait.adapter.site import first_input
from plait.errors import PlaitError
from plait.routers._ffn_experts import FfnExperts, expert_parameters, ffn_sizes
from plait.routers._policy import Policy, TopK, TopP, balance_loss, recorded, route


@dataclass(frozen=True)
class MixLoraOptions(PairOptions):
    rank: int = 16
    """Rank r of each expert's LoRAs and of those on attention (paper: 16)."""
    experts: int = 8
    """Experts N a block (paper: 8)."""
    strategy: Literal["top-k", "top-p"] = "top-k"
    """A fixed number of experts a token, or the fewest that reach probability `top_p`."""
    top_k: int = 2
    """Experts k that a token uses (paper: 2)."""
    top_p: float = 0.8
    """Probability that the chosen experts of "top-p" reach together."""
    renormalize: bool | None = None
    """Make a token's weights sum to 1; None does so for "top-k" and not for "top-p"."""
    balance: float = 1e-3
    """Weight of the balance loss in `plait.auxiliary_loss` (paper's code: 1e-3; its text: 1e-2)."""
    router_std: float = 0.02
    """Standard deviation of the router's start (paper's code: 0.02)."""
    jitter: float = 0.0
    """In training, multiply the router's input by U(1 - jitter, 1 + jitter)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy not in ("top-k", "top-p"):
            raise PlaitError(f"strategy must be 'top-k' or 'top-p', not {self.strategy!r}.")
        if not 1 <= self.top_k <= self.experts:
            raise PlaitError(
                f"top_k={self.top_k} does not fit {self.experts} experts; choose 1 to "
                f"{self.experts}."
            )
        if not 0 < self.top_p <= 1:
            raise PlaitError(f"top_p must lie in (0, 1], not {self.top_p}.")

    @property
    def renormalizes(self) -> bool:
        return self.strategy == "top-k" if self.renormalize is None else self.renormalize

    @property
    def policy(self) -> Policy:
        if self.strategy == "top-k":
            return TopK(self.top_k, self.renormalizes)
        return TopP(self.top_p, self.renormalizes)


class MixLoraDelta(FfnExperts):
    traits = Traits(linear_in_x=False, reads_input=True, reads_output=True)
    options: MixLoraOptions
    router: Tensor

    def build(self) -> None:
        if not self.options.renormalizes:
            self.traits = replace(self.traits, zero_start=False)
        inputs, _ = ffn_sizes(self.site)
        wide = torch.promote_types(self.dtype, torch.float32)
        self.parameter("router", self.options.experts, inputs, dtype=wide)
        super().build()

    def reset(self) -> None:
        self.start("router", "normal")
        self.router.mul_(self.options.router_std)
        super().reset()

    def adapt(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = first_input(args, kwargs)
        routing = route(self, x, self.options.policy)
        return self.mixture(x, routing, sums_to_one=self.options.renormalizes)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """What the mixture adds to the block's own output y for its input x."""
        return self.adapt(x) - (self.site.forward(x) if y is None else y)

    @classmethod
    def auxiliary_loss(cls, deltas: Sequence[Delta], context: Context) -> Tensor | None:
        """balance * N sum_i F_i P_i over all blocks together; k at perfect balance of top-k."""
        groups: dict[tuple[int, float], list[dict[str, Tensor]]] = {}
        for delta in deltas:
            found = recorded(context, delta)
            if found is not None and isinstance(delta, MixLoraDelta) and delta.options.balance:
                key = delta.options.experts, delta.options.balance
                groups.setdefault(key, []).append(found)
        terms = [balance * balance_loss(group) for (_, balance), group in groups.items()]
        return torch.stack(terms).sum() if terms else None


def _choose(model: nn.Module, options: Any) -> list[tuple[Site, type[Delta]]]:
    """The mixture on every gated feed-forward block, a plain LoRA on every other linear."""
    blocks = find_sites(model, "ffn")
    inside = tuple(f"{site.path}." for site in blocks)
    others = [s for s in find_sites(model, "all-linear") if not s.path.startswith(inside)]
    return [*((s, MixLoraDelta) for s in blocks), *((s, PairDelta) for s in others)]


def _count(sites: Sequence[Site], o: MixLoraOptions) -> int:
    total = 0
    for site in sites:
        if site.kind != "module":
            total += o.rank * (site.in_features + site.out_features)
            continue
        inputs, _ = ffn_sizes(site)
        total += o.experts * (expert_parameters(site, o.rank) + inputs)
    return total


METHOD = Method(
    name="mixlora",
    title="MixLoRA: LoRA experts inside the feed-forward block",
    paper="Li et al., 2024, arXiv 2404.15159",
    axis="routing",
    options=MixLoraOptions,
    delta=MixLoraDelta,
    count=_count,
    targets="ffn",
    choose=_choose,
    example={"rank": 2, "experts": 4},
)
