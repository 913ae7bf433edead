"""A small model with adapters that are not trained but random: coefficients are then planted."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import plait

WIDTH, CLASSES = 8, 5


class Net(nn.Module):
    """Two blocks and a head; returns logits, and with labels the cross-entropy."""

    def __init__(self, smooth: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(WIDTH, 12), "down": nn.Linear(12, WIDTH, bias=False)})
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, CLASSES)
        self.bend = torch.tanh if smooth else (lambda x: x)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        h = x
        for layer in self.layers:
            h = h + layer["down"](self.bend(layer["up"](h)))
        logits = self.head(h)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def network(names: tuple[str, ...] = ("one", "two"), size: float = 0.4) -> nn.Module:
    torch.manual_seed(1)
    net = Net().double()
    for i, name in enumerate(names):
        adapter = plait.attach(
            net, "lora", name=name, rank=2 + i % 2, alpha=3.0, targets="all-linear", seed=i
        )
        draw = torch.Generator().manual_seed(20 + i)
        for p in adapter.parameters():
            p.data = (size * torch.randn(p.shape, generator=draw)).double()
    plait.activate(net, {})
    return net


def inputs(seed: int = 0, rows: int = 24) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=g, dtype=torch.float64)


def planted(net: nn.Module, weights: dict, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches whose `target` is what the model answers with these weights active."""
    twin = copy.deepcopy(net)
    plait.activate(twin, weights)
    with torch.no_grad():
        return [{"x": x, "target": twin(x).logits} for x in (inputs(seed), inputs(seed + 50))]


def squared(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]).logits - batch["target"]).square().mean()
