"""Real tasks small enough for many runs on two cores: a base that is trained once, and data to
adapt it to.

Each splits its adaptation data in train, validation (learning rates are chosen on it) and test
(what tables show).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lab.store import TRIALS

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A base model and the data it is to be adapted to.

    `base()` is the trained base; `splits()` gives {"train", "validation", "test"} of aligned
    tensors, labels under "labels"; `targets` are the sites that adapters take, `head` modules that
    are trained beside them. `tuned_by` is what learning rates are chosen by on validation data:
    with a handful of labels the least loss is that of a model that says nothing.
    """

    name: str
    title: str
    base: Callable[[], nn.Module]
    splits: Callable[[], Mapping[str, Batch]]
    targets: Any = "all-linear"
    head: tuple[str, ...] = ()
    steps: int = 200
    batch_size: int = 32
    tuned_by: Literal["loss", "accuracy"] = "loss"

    def fresh(self) -> nn.Module:
        """A copy of the base of its own."""
        return copy.deepcopy(self.base())

    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless random batches of the training split."""
        train = self.splits()["train"]
        generator = torch.Generator().manual_seed(seed)
        count = len(train["labels"])
        while True:
            order = torch.randperm(count, generator=generator)
            for start in range(0, count - self.batch_size + 1, self.batch_size):
                yield {k: v[order[start : start + self.batch_size]] for k, v in train.items()}

    def held_out(self) -> Iterator[Batch]:
        """The validation split in batches, for rules that learn on held-out data."""
        return _parts(self.splits()["validation"], self.batch_size)

    def score(self, model: nn.Module, split: str) -> dict[str, float]:
        """{"loss", "accuracy"} on a split."""
        data = self.splits()[split]
        was = model.training
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(**part).logits for part in _parts(data, 256)])
        model.train(was)
        labels = data["labels"]
        hits = (logits.argmax(-1) == labels).double().mean().item()
        return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": hits}


def _parts(data: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(data["labels"]), size):
        yield {k: v[start : start + size] for k, v in data.items()}


@dataclass
class Output:
    """What a model gives back: the loss where there are labels, and logits [N, classes]."""

    loss: Tensor | None
    logits: Tensor


class Classifier(nn.Module):
    """A network over one input tensor, called as transformers' classifiers are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.network(pixels)
        return Output(None if labels is None else F.cross_entropy(logits, labels), logits)


class Block(nn.Module):
    """A pre-norm transformer block with separate q, k, v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o_proj(attended)
        return x + self.down_proj(F.gelu(self.up_proj(self.norm2(x))))


class Vit(nn.Module):
    """A vision transformer for 8 x 8 pictures in 2 x 2 patches."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = pixels.unflatten(1, (4, 2)).unflatten(3, (4, 2)).permute(0, 1, 3, 2, 4).flatten(3)
        x = self.embed(patches.flatten(1, 2)) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x.mean(1)))


@cache
def _digits() -> tuple[Batch, Batch]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels: (for the base, for the adaptation)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order], labels[order]
    return (
        {"pixels": pixels[:800], "labels": labels[:800]},
        {"pixels": pixels[800:], "labels": labels[800:]},
    )


def _split(data: Batch, train: int) -> dict[str, Batch]:
    """The first `train` rows, then 300 to choose by, then the rest to judge by."""
    ends = {"train": (0, train), "validation": (train, train + 300), "test": (train + 300, None)}
    return {name: {k: v[slice(*at)] for k, v in data.items()} for name, at in ends.items()}


def _pretrain(name: str, network: nn.Module, steps: int = 400) -> nn.Module:
    """The network trained on the base's digits; kept on disk, for every claim starts with it."""
    model, data = Classifier(network), _digits()[0]
    file = TRIALS / f"base-{name}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(800, (64,), generator=draw)
        model(data["pixels"][rows], data["labels"][rows]).loss.backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    file.parent.mkdir(exist_ok=True)
    save_file(model.state_dict(), file)
    return model.eval()


@cache
def _vit() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _pretrain("vit", Vit())


@cache
def _mlp() -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _pretrain("mlp", nn.Sequential(*layers, nn.Linear(128, 10)))


@cache
def _turned() -> dict[str, Batch]:
    """Turned by a quarter and inverted: what the base saw, seen otherwise."""
    data = _digits()[1]
    return _split(
        {"pixels": -torch.rot90(data["pixels"], 1, (1, 2)), "labels": data["labels"]}, 400
    )


@cache
def _few() -> dict[str, Batch]:
    """The same with six labelled pictures a class."""
    splits = _turned()
    labels = splits["train"]["labels"]
    rows = torch.cat([(labels == c).nonzero()[:6, 0] for c in range(10)])
    return {**splits, "train": {k: v[rows] for k, v in splits["train"].items()}}


@cache
def _noisy() -> dict[str, Batch]:
    """The turned ones, trained on 9 of a digit below 5 for one above, a fifth of the labels wrong.

    What is chosen by and judged by stays clean, with all digits alike.
    """
    splits = _turned()
    train, draw = splits["train"], torch.Generator().manual_seed(2)
    of_class = [(train["labels"] == c).nonzero()[:, 0] for c in range(10)]
    rows = torch.cat([r[: 36 if c < 5 else 4] for c, r in enumerate(of_class)])
    labels = train["labels"][rows]
    wrong = torch.randperm(len(rows), generator=draw)[: len(rows) // 5]
    shift = torch.randint(1, 10, (len(wrong),), generator=draw)
    labels[wrong] = (labels[wrong] + shift) % 10
    return {**splits, "train": {"pixels": train["pixels"][rows], "labels": labels}}


@cache
def _shuffled() -> dict[str, Batch]:
    """The pixels in another fixed order: undoing it takes a change of full rank."""
    data = _digits()[1]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    pixels = data["pixels"].flatten(1)[:, order].unflatten(1, (8, 8))
    return _split({"pixels": pixels, "labels": data["labels"]}, 400)


LAYERS = r"network\.layers\..*_proj"
TASKS = {
    task.name: task
    for task in (
        Task(
            "digits-vit",
            "ViT (4 layers of 64) trained on 800 digits, adapted to 400 turned and inverted ones",
            _vit,
            _turned,
            targets=LAYERS,
        ),
        Task(
            "digits-few",
            "the same ViT, adapted to six turned and inverted digits a class",
            _vit,
            _few,
            targets=LAYERS,
            batch_size=20,
            tuned_by="accuracy",
        ),
        Task(
            "digits-noisy",
            "the same ViT, adapted to turned and inverted digits of which 5 to 9 are rare and a "
            "fifth of the labels wrong; judged on clean ones",
            _vit,
            _noisy,
            targets=LAYERS,
            tuned_by="accuracy",
        ),
        Task(
            "digits-shuffled",
            "MLP (64-128-128-10) trained on 800 digits, adapted to 400 with shuffled pixels",
            _mlp,
            _shuffled,
            targets=[r"network.1", r"network.3"],
            steps=300,
        ),
    )
}
