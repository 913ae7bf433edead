"""Two digits classifiers from different starts: one for 0 to 4 and one for 5 to 9, or alike."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(found.data, dtype=torch.float32)[order] / 16
    return x, torch.tensor(found.target)[order]


def mlp(seed: int, width: int = 128) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def held_out(classes: range | None = None) -> tuple[Tensor, Tensor]:
    x, y = (t[1200:] for t in digits())
    chosen = torch.ones(len(y), dtype=torch.bool)
    if classes is not None:
        chosen = (y >= classes.start) & (y < classes.stop)
    return x[chosen], y[chosen]


def batches(count: int = 600) -> list[dict[str, Tensor]]:
    return [{"input": part} for part in digits()[0][:count].split(200)]


@cache
def trained(apart: bool = True) -> tuple[nn.Sequential, nn.Sequential]:
    """On five classes each, or both on all ten."""
    made, whole = [], range(10)
    for seed, classes in ((3, range(5) if apart else whole), (4, range(5, 10) if apart else whole)):
        x, y = (t[:1200] for t in digits())
        chosen = (y >= classes.start) & (y < classes.stop)
        x, y, model = x[chosen], y[chosen], mlp(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(120):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        made.append(model.eval())
    return made[0], made[1]


def accuracy(model: nn.Module) -> float:
    x, y = held_out()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())
