"""MoLA: a mixture of LoRA experts at every linear layer, more experts in higher layers.

    x ──┬──► W ──────────────────────────────────────────────────────────────► + ──► y
        ├──► router R (N x in) ──► softmax, top k, renormalised ──► w ──┐      │
        └──► A of all experts (N r x in) ──► * w ──► B of all experts (out x N r) ──► * scaling

y = W x + scaling * sum_e w_e B_e A_e x, with w_e = 0 for experts outside a token's top k. All
experts stand in one product of inner size N r and the gate acts on its [tokens, N r] middle, which
for the usual N r costs less than sorting tokens by expert. The router reads this layer's own input.
A and R start at U(-1/sqrt(in), 1/sqrt(in)), B at zero. A mixture has no dW: it can be neither fused
nor exported.
Paper: Gao et al., 2024, arXiv 2402.08562. Parameters: N (r (in + out) + in) a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Context, Delta, Method, PairOptions, SharedTensors, Site, Traits
from plait.adapter.site import first_input
from plait.adapter.targets import block_index
from plait.errors import PlaitError
from plait.routers._layers import Layer, layers_of, spread
from plait.routers._policy import TopK, balance_loss, recorded, route

PER_LAYER = int | Sequence[int] | None
SHAPE = (2, 4, 6, 8)


@dataclass(frozen=True)
class MolaOptions(PairOptions):
    experts: PER_LAYER = None
    """Experts N: one number, or a list spread over equal groups of the adapted layers, from the
    lowest to the highest. None is the paper's 2-4-6-8 over quarters of any depth."""
    top_k: PER_LAYER = 2
    """Experts k that a token uses (paper: 2); a number or a list like `experts`."""
    balance: float = 1e-3
    """Weight of the balance loss in `plait.auxiliary_loss` (paper: 1e-3, where it is on)."""
    jitter: float = 0.0
    """In training, multiply the router's input by U(1 - jitter, 1 + jitter)."""

    def counts(self, site: Site, layer: Layer) -> tuple[int, int]:
        """(N, k) at a site in that layer."""
        position, layers = layer
        if self.experts is None:
            experts = SHAPE[len(SHAPE) * position // layers]
        else:
            experts = spread("experts", self.experts, layer)
        top_k = 1 if self.top_k is None else spread("top_k", self.top_k, layer)
        if not 1 <= top_k <= experts:
            raise PlaitError(
                f"site {site.path!r} has {experts} experts, so top_k={top_k} does not fit; choose "
                f"1 to {experts}."
            )
        return experts, top_k


class MolaDelta(Delta):
    traits = Traits(linear_in_x=False)
    options: MolaOptions
    router: Tensor
    A: Tensor
    B: Tensor

    @classmethod
    def prepare(cls, sites: Sequence[Site], options: MolaOptions, shared: SharedTensors) -> None:
        shared.notes["mola"] = layers_of(sites)

    def build(self) -> None:
        layer = self.shared.notes["mola"][self.site.path]
        self.experts, self.top_k = self.options.counts(self.site, layer)
        rank = self.options.rank
        self.parameter("router", self.experts, self.site.in_features)
        self.parameter("A", self.experts, rank, self.site.in_features)
        self.parameter("B", self.site.out_features, self.experts, rank)

    def reset(self) -> None:
        self.start("router", "kaiming_uniform")
        self.start("A", "kaiming_uniform")

    def _gated(self, x: Tensor) -> Tensor:
        """[..., N r]: every expert's hidden features, weighted for each token."""
        routing = route(self, x, TopK(self.top_k))
        seen = F.dropout(x, self.options.dropout, self.training)
        hidden = F.linear(seen, self.A.flatten(0, 1).to(x.dtype))
        gate = (routing.weights * self.options.scaling).to(hidden.dtype).unsqueeze(-1)
        return (hidden.unflatten(-1, (self.experts, -1)) * gate).flatten(-2)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        hidden = self._gated(x)
        return F.linear(hidden, self.B.flatten(1).to(hidden.dtype))

    def adapt(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = first_input(args, kwargs)
        y = self.site.forward(x)
        hidden = self._gated(x).to(y.dtype)
        B = self.B.flatten(1).to(y.dtype)
        flat = torch.addmm(y.flatten(0, -2), hidden.flatten(0, -2), B.t())  # one pass over y less
        return flat.view(y.shape)

    @classmethod
    def auxiliary_loss(cls, deltas: Sequence[Delta], context: Context) -> Tensor | None:
        """balance * sum over layers of N sum_i (share of slots of i) (mean probability of i).

        All linears of a layer count together; at perfect balance a layer adds 1.
        """
        layers: dict[Any, list[tuple[MolaDelta, dict[str, Tensor]]]] = {}
        for delta in deltas:
            found = recorded(context, delta)
            if found is None or not isinstance(delta, MolaDelta) or not delta.options.balance:
                continue
            layer = block_index(delta.site.path)
            key = delta.site.path if layer is None else layer
            layers.setdefault((key, delta.experts, delta.top_k), []).append((delta, found))
        terms = [
            group[0][0].options.balance * balance_loss(s for _, s in group) / group[0][0].top_k
            for group in layers.values()
        ]
        return torch.stack(terms).sum() if terms else None


def _count(sites: Sequence[Site], o: MolaOptions) -> int:
    table = layers_of(sites)
    experts = [o.counts(s, table[s.path])[0] for s in sites]
    sizes = [o.rank * (s.in_features + s.out_features) + s.in_features for s in sites]
    return sum(n * size for n, size in zip(experts, sizes, strict=True))


METHOD = Method(
    name="mola",
    title="MoLA: more LoRA experts in higher layers",
    paper="Gao et al., 2024, arXiv 2402.08562",
    axis="routing",
    options=MolaOptions,
    delta=MolaDelta,
    count=_count,
)
