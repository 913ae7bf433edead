"""Experts inside a gated feed-forward block that share its frozen weights.

    h ──► W_gate, W_up  once for all experts ──┐
    h ──► A of all experts ──► B_e of expert e ┴──► z_e = act(gate_e) * up_e   on e's own tokens
    sum_e w_e z_e ──► W_down once ──► + sum_e B_e A_e (w_e z_e) ──► y

An expert is a set of LoRAs on the block's three linears, E_e(h) = D_e(act(G_e h) * U_e h), and the
block answers sum_e w_e E_e(h). Base products are computed once; tokens are gathered by expert only
behind them. Who chooses the weights w is the method's matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Site
from plait.errors import PlaitError
from plait.routers._policy import Routing


def ffn_sizes(site: Site) -> tuple[int, int]:
    """(d, m) of a gated feed-forward block; kept in the site's details, so that files have them."""
    if site.module is not None:
        gate: Any = site.base.get_submodule("gate_proj")
        site.details["ffn"] = [int(gate.in_features), int(gate.out_features)]
    if "ffn" not in site.details:
        raise PlaitError(f"site {site.path!r} does not say how wide its feed-forward block is.")
    inputs, hidden = site.details["ffn"]
    return inputs, hidden


def expert_parameters(site: Site, rank: int) -> int:
    """Trainable numbers in one expert's three pairs."""
    return rank * sum(rows + columns for rows, columns in _linears(site).values())


def _linears(site: Site) -> dict[str, tuple[int, int]]:
    """{name: (out, in)} of the block's linears."""
    inputs, hidden = ffn_sizes(site)
    return {"gate": (hidden, inputs), "up": (hidden, inputs), "down": (site.out_features, hidden)}


class FfnExperts(Delta):
    """N experts' pairs: A_<linear> [N, r, in] and B_<linear> [out, N, r].

    The options need `experts`, `rank`, `scaling` and `dropout`.
    """

    kinds = frozenset({"module"})

    def build(self) -> None:
        o = self.options
        for name, (rows, columns) in _linears(self.site).items():
            self.parameter(f"A_{name}", o.experts, o.rank, columns)
            self.parameter(f"B_{name}", rows, o.experts, o.rank)

    def reset(self) -> None:
        for name in _linears(self.site):
            self.start(f"A_{name}", "kaiming_uniform")

    def mixture(self, x: Tensor, routing: Routing, sums_to_one: bool) -> Tensor:
        """sum_e w_e E_e(x) [..., out] for x [..., d]; unless each token's weights sum to 1, a bias
        of W_down counts with their sum."""
        o = self.options
        mixed, hidden = self._inner(x.reshape(-1, x.shape[-1]), routing)
        down: Any = self.site.base.get_submodule("down_proj")
        y = down(mixed)
        B = self.get_parameter("B_down").flatten(1).to(y.dtype)
        y = torch.addmm(y, hidden.to(y.dtype), B.t(), alpha=o.scaling)
        bias = getattr(down, "bias", None)
        if bias is not None and not sums_to_one:
            total = routing.weights.reshape(-1, o.experts).sum(-1, keepdim=True)
            y = y + ((total - 1) * bias).to(y.dtype)  # each expert brings its share of the bias
        return y.view(*x.shape[:-1], -1)

    def _inner(self, h: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
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
