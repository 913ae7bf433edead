"""Tasks of known outcome, small enough for a bake-off in a test."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.study import Task
from plait.training.recipe import Recipe

WIDTH = 12


class Net(nn.Module):
    """Two linears; called as transformers' models are."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw) / WIDTH**0.5

    def forward(self, x: Tensor, y: Tensor | None = None) -> SimpleNamespace:
        out = self.second(torch.tanh(self.first(x)))
        return SimpleNamespace(out=out, loss=None if y is None else F.mse_loss(out, y))


class Toy(Task):
    """Regression onto what `target` makes of the inputs; the score is minus the error."""

    name, metric, higher_is_better = "toy", "minus the error", True
    recipe = Recipe(steps=40, targets="all-linear", options={"rank": 2}, batch_size=32, warmup=0.1)
    loads = 0

    def load(self) -> nn.Module:
        type(self).loads += 1
        return Net()

    def target(self, x: Tensor, draw: torch.Generator) -> Tensor:
        raise NotImplementedError

    def rows(self, seed: int, count: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(count, WIDTH, generator=draw)
        return {"x": x, "y": self.target(x, draw)}

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        number = 1000 * (seed + 1)
        while True:
            number += 1
            yield self.rows(number, self.recipe.batch_size)

    def validate(self, model: nn.Module) -> float:
        return float(model(**self.rows(1, 100)).loss)

    def scores(self, model: nn.Module) -> Iterator[float]:
        test = self.rows(2, 60)
        yield from (-(model(test["x"]).out - test["y"]).square().mean(1)).tolist()

    def facts(self) -> dict[str, int]:
        return {"width": WIDTH}


class OneMustWin(Toy):
    """The target differs from the base by a change of rank 2 in the last layer: LoRA can make it,
    scaling the features (IA3) cannot."""

    def target(self, x: Tensor, draw: torch.Generator) -> Tensor:
        base, fixed = Net(), torch.Generator().manual_seed(7)
        B, A = (torch.randn(s, generator=fixed) for s in ((WIDTH, 2), (2, WIDTH)))
        with torch.no_grad():
            hidden = torch.tanh(base.first(x))
            return base.second(hidden) + hidden @ A.T @ B.T / 2


class AllAlike(Toy):
    """Targets are coin flips that the inputs say nothing of: what is scored is a coin flip too."""

    metric = "accuracy"

    def target(self, x: Tensor, draw: torch.Generator) -> Tensor:
        return torch.randint(0, 2, x.shape, generator=draw).float()

    def scores(self, model: nn.Module) -> Iterator[float]:
        test = self.rows(2, 200)
        found = model(test["x"]).out
        middle = found.median()  # as many on either side, however far training came
        yield from ((found[:, 0] > middle).float() == test["y"][:, 0]).float().tolist()


WINNER = OneMustWin()
