"""MixLoRA: every feed-forward block becomes a mixture of experts that share its frozen weights.

    h ──► router G (N x d), float32 ──► softmax, top k, renormalised ──► w [tokens, N]
    h ──► W_gate, W_up  once for all experts ──┐
    h ──► A of all experts ──► B_e of expert e ┴──► z_e = act(gate_e) * up_e   on e's own tokens
    sum_e w_e z_e ──► W_down once ──► + sum_e B_e A_e (w_e z_e) ──► y

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
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.adapter import Context, Delta, Method, PairDelta, PairOptions, Site, Traits, find_sites
from plait.errors import PlaitError
from plait.routers._policy import (
    Policy,
    Routing,
    TopK,
    TopP,
    balance_loss,
    record,
    recorded,
    router_logits,
)


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


def ffn_sizes(site: Site) -> tuple[int, int]:
    """(d, m) of a gated feed-forward block; kept in the site's details, so that files have them."""
    if site.module is not None:
        gate: Any = site.base.get_submodule("gate_proj")
        site.details["ffn"] = [int(gate.in_features), int(gate.out_features)]
    if "ffn" not in site.details:
        raise PlaitError(f"site {site.path!r} does not say how wide its feed-forward block is.")
    inputs, hidden = site.details["ffn"]
    return inputs, hidden


class MixLoraDelta(Delta):
    kinds = frozenset({"module"})
    traits = Traits(linear_in_x=False, reads_input=True, reads_output=True)
    options: MixLoraOptions
    router: Tensor

    def build(self) -> None:
        if not self.options.renormalizes:
            self.traits = Traits(
                linear_in_x=False, reads_input=True, reads_output=True, zero_start=False
            )
        inputs, hidden = ffn_sizes(self.site)
        experts, rank = self.options.experts, self.options.rank
        wide = torch.promote_types(self.dtype, torch.float32)
        self.parameter("router", experts, inputs, dtype=wide)
        for name, rows, columns in (
            ("gate", hidden, inputs),
            ("up", hidden, inputs),
            ("down", self.site.out_features, hidden),
        ):
            self.parameter(f"A_{name}", experts, rank, columns)
            self.parameter(f"B_{name}", rows, experts, rank)

    def reset(self) -> None:
        self.start("router", "normal")
        self.router.mul_(self.options.router_std)
        for name in ("gate", "up", "down"):
            self.start(f"A_{name}", "kaiming_uniform")

    def adapt(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        jitter = self.options.jitter if self.training else 0.0
        routing = self.options.policy(router_logits(x, self.router, jitter))
        record(self, x, routing)
        mixed, hidden = self._experts(x.reshape(-1, x.shape[-1]), routing)
        down: Any = self.site.base.get_submodule("down_proj")
        y = down(mixed)
        B = self.get_parameter("B_down").flatten(1).to(y.dtype)
        y = torch.addmm(y, hidden.to(y.dtype), B.t(), alpha=self.options.scaling)
        bias = getattr(down, "bias", None)
        if bias is not None and not self.options.renormalizes:
            total = routing.weights.reshape(-1, self.options.experts).sum(-1, keepdim=True)
            y = y + ((total - 1) * bias).to(y.dtype)  # each expert brings its share of the bias
        return y.view(*x.shape[:-1], -1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """What the mixture adds to the block's own output y for its input x."""
        return self.adapt(x) - (self.site.forward(x) if y is None else y)

    def _experts(self, h: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """sum_e w_e z_e [T, m], and A_down,e (w_e z_e) of every expert, [T, N r].

        Tokens come sorted by expert; each expert works on its own rows only.
        """
        o = self.options
        ffn: Any = self.site.base
        gate, up = ffn.gate_proj(h), ffn.up_proj(h)
        low = self._low(h).to(gate.dtype)
        weights = routing.weights.reshape(-1, o.experts)
        experts, tokens = routing.chosen.reshape(-1, o.experts).t().nonzero(as_tuple=True)
        shares = weights[tokens, experts].to(gate.dtype).unsqueeze(-1)
        counts = torch.bincount(experts, minlength=o.experts).tolist()
        mixed, downs = torch.zeros_like(gate), []
        for e, (rows, share) in enumerate(
            zip(tokens.split(counts), shares.split(counts), strict=True)
        ):
            mine = low[e].index_select(0, rows)
            z = ffn.act_fn(self._expert_linear("gate", e, gate, mine[:, : o.rank], rows))
            z = z * self._expert_linear("up", e, up, mine[:, o.rank :], rows) * share
            mixed.index_add_(0, rows, z)
            seen = F.dropout(z, o.dropout, self.training)
            downs.append(F.linear(seen, self.get_parameter("A_down")[e].to(z.dtype)))
        hidden = gate.new_zeros(len(h) * o.experts, o.rank)
        hidden = hidden.index_copy(0, tokens * o.experts + experts, torch.cat(downs).to(gate.dtype))
        return mixed, hidden.view(len(h), -1)

    def _low(self, h: Tensor) -> Tensor:
        """[N, T, 2 r]: each expert's A_gate h and A_up h, in one product."""
        A = torch.cat([self.get_parameter("A_gate"), self.get_parameter("A_up")], 1)
        seen = F.dropout(h, self.options.dropout, self.training)
        low = F.linear(seen, A.flatten(0, 1).to(h.dtype))
        return low.unflatten(-1, (self.options.experts, -1)).transpose(0, 1)

    def _expert_linear(self, name: str, e: int, base: Tensor, low: Tensor, rows: Tensor) -> Tensor:
        """Expert e's gate or up product on its own rows: the shared base's plus its LoRA's."""
        B = self.get_parameter(f"B_{name}")[:, e].to(base.dtype)
        mine = base.index_select(0, rows)
        return torch.addmm(mine, low, B.t(), alpha=self.options.scaling)

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
        inputs, hidden = ffn_sizes(site)
        pairs = 2 * (inputs + hidden) + hidden + site.out_features
        total += o.experts * (o.rank * pairs + inputs)
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
