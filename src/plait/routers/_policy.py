"""What routers of experts share: logits, the choice of experts, statistics and balance.

A policy turns logits [..., N] into a `Routing`; how experts are evaluated is the delta's matter.
Statistics are sums over tokens, so that a loss over many sites needs no logits kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Context, Delta


@dataclass(frozen=True)
class Routing:
    """Decisions for some tokens, over N experts."""

    probabilities: Tensor
    """[..., N]: softmax over all experts."""
    chosen: Tensor
    """[..., N], bool."""
    weights: Tensor
    """[..., N]: what the chosen experts' outputs are multiplied by; 0 elsewhere."""

    def statistics(self, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Sums over the tokens that `mask` [...] keeps: `probability` and `load` [N], `tokens`."""
        probabilities, chosen = self.probabilities, self.chosen.to(self.probabilities.dtype)
        experts = probabilities.shape[-1]
        if mask is None:
            tokens = probabilities.new_tensor(probabilities.numel() / experts)
        else:
            kept = mask.to(probabilities.dtype).unsqueeze(-1)
            probabilities, chosen = probabilities * kept, chosen * kept
            tokens = kept.sum()
        return {
            "probability": probabilities.reshape(-1, experts).sum(0),
            "load": chosen.reshape(-1, experts).sum(0),
            "tokens": tokens,
        }


@dataclass(frozen=True)
class TopK:
    """The k likeliest experts; weights renormalised to sum to 1, or left as probabilities."""

    k: int
    renormalize: bool = True

    def __call__(self, logits: Tensor) -> Routing:
        probabilities = logits.softmax(-1)
        values, index = logits.topk(self.k, dim=-1)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, True)
        if not self.renormalize:
            return Routing(probabilities, chosen, probabilities * chosen)
        # A softmax over the chosen logits is the renormalised one, without dividing small numbers.
        weights = torch.zeros_like(logits).scatter(-1, index, values.softmax(-1))
        return Routing(probabilities, chosen, weights)


@dataclass(frozen=True)
class TopP:
    """The fewest likeliest experts that together reach probability p; at least one."""

    p: float
    renormalize: bool = False

    def __call__(self, logits: Tensor) -> Routing:
        probabilities = logits.softmax(-1)
        ordered, index = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        keep = before < self.p
        keep[..., 0] = True
        chosen = torch.zeros_like(keep).scatter(-1, index, keep)
        weights = probabilities * chosen
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(probabilities, chosen, weights)


Policy = TopK | TopP


def router_logits(x: Tensor, router: Tensor, jitter: float = 0.0) -> Tensor:
    """x [..., in] times the router's rows [N, in], in float32 at least, autocast or not.

    `jitter` e multiplies x by U(1 - e, 1 + e), from PyTorch's generator: checkpointing replays it.
    """
    dtype = torch.promote_types(torch.float32, x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        seen = x.to(dtype)
        if jitter:
            seen = seen * torch.empty_like(seen).uniform_(1 - jitter, 1 + jitter)
        return F.linear(seen, router.to(dtype))


def token_mask(context: Context, x: Tensor) -> Tensor | None:
    """`attention_mask` of `plait.routing` as the tokens of x [batch, length, in], or None.

    While a model generates with a cache, x holds the last tokens of the masked rows.
    """
    mask = context.get("attention_mask")
    if mask is None or x.dim() != 3 or mask.dim() != 2:
        return None
    mask = mask[:, -x.shape[1] :]
    return mask.to(x.device) if mask.shape == x.shape[:2] else None


def _key(delta: Delta) -> str:
    # Two routed adapters may be active at one site.
    return f"{delta.site.path}#{id(delta)}"


def record(delta: Delta, x: Tensor, routing: Routing) -> None:
    """Leave this forward's statistics in the context."""
    mask = token_mask(delta.context, x)
    delta.context.record(_key(delta), **routing.statistics(mask))


def route(delta: Delta, x: Tensor, policy: Policy) -> Routing:
    """The decisions for x [..., in] of a delta with a parameter `router` and an option `jitter`;
    their statistics stay in the context."""
    jitter = delta.options.jitter if delta.training else 0.0
    routing = policy(router_logits(x, delta.get_parameter("router"), jitter))
    record(delta, x, routing)
    return routing


def recorded(context: Context, delta: Delta) -> dict[str, Tensor] | None:
    """What `record` left for this delta in the last forward."""
    return context.records.get(_key(delta))


def balance_loss(statistics: Iterable[dict[str, Tensor]]) -> Tensor:
    """N sum_i (share of tokens that chose i) (mean probability of i), over all given sites.

    For top-k routing that is k where load and probability are uniform, and more where experts with
    more load are the likelier ones.
    """
    found: list[dict[str, Any]] = list(statistics)
    tokens = torch.stack([s["tokens"] for s in found]).sum().clamp(min=1)
    load = torch.stack([s["load"] for s in found]).sum(0) / tokens
    probability = torch.stack([s["probability"] for s in found]).sum(0) / tokens
    return load.shape[0] * (load * probability).sum()
