"""Small models for rules: a float64 stack of blocks, and a bare linear layer with a known loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import plait


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Embedding, `depth` blocks, norm, head; returns the mean cross-entropy of the next token."""

    def __init__(self, depth: int = 4, width: int = 6, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def make_stack(seed: int = 0, dtype: torch.dtype = torch.float64, **shape: int) -> Stack:
    torch.manual_seed(seed)
    return Stack(**shape).to(dtype)


def batches(count: int, vocabulary: int = 11) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(vocabulary, (3, 7), generator=g) for _ in range(count)]


def train(model: nn.Module, run: plait.RuleStack, data: list[Tensor]) -> list[float]:
    """The bare loop; returns the losses."""
    losses = []
    for ids in data:
        loss = model(ids)
        (loss + run.extra_loss()).backward()
        run.step()
        losses.append(float(loss.detach()))
    return losses


def randomise(adapter: plait.Adapter, seed: int = 3) -> None:
    """Every parameter of an adapter drawn from N(0, 0.3), so that nothing is zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))


SITES = ["up", "down"]


def adapted_lora(seed: int | None = 3, **options: object) -> tuple[Stack, plait.Adapter]:
    """A stack under a LoRA of rank 3 on its blocks, with random factors unless seed is None."""
    model = make_stack()
    options = {"rank": 3, "alpha": 5, "targets": SITES, "seed": 0, **options}
    adapter = plait.attach(model, "lora", **options)
    if seed is not None:
        randomise(adapter, seed)
    return model, adapter


def dense(adapter: plait.Adapter) -> dict[str, Tensor]:
    """{site path: dW}."""
    return {path: delta.dense().detach() for path, delta in adapter.deltas.items()}
