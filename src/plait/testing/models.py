"""Tiny base models for the test kit, one for every kind of site.

All are seeded, and every weight is a number that bfloat16 holds exactly: the same base then exists
in bfloat16, float32 and float64, and a difference between their outputs is rounding alone.
Forward takes one tensor (and labels) and returns `(logits, loss)`; the Llama keeps its own outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.adapter.targets import Targets
from plait.errors import unknown

CLASSES = 10
WIDTH = 12
VOCABULARY = 32


class Output(NamedTuple):
    """What the kit's own models return: logits [..., classes] and, given labels, the loss."""

    logits: Tensor
    loss: Tensor | None = None


class _Classifier(nn.Module):
    """Logits from `self.logits(x)`, and their cross-entropy."""

    def logits(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.logits(x)
        if labels is None:
            return Output(logits)
        return Output(logits, F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten()))


class ResidualBlock(nn.Module):
    """h + down(tanh(up(h))): `up` [16, 12] has a bias, `down` [12, 16] has none."""

    def __init__(self, linear: Callable[[int, int, bool], nn.Module]) -> None:
        super().__init__()
        self.up = linear(WIDTH, 16, True)
        self.down = linear(16, WIDTH, False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.up(h)))


class ResidualNet(_Classifier):
    """Two residual blocks and a head [10, 12]; x [..., 12]."""

    def __init__(self, linear: Callable[[int, int, bool], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ResidualBlock(linear) for _ in range(2)])
        self.head = linear(WIDTH, CLASSES, True)

    def logits(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ConvNet(_Classifier):
    """Two convolutions; x [batch, 4, 6, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.second = nn.Conv2d(6, CLASSES, 3, stride=2, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).mean((-1, -2))


class TokenNet(_Classifier):
    """An embedding [10, 14], averaged, and a linear head; x [batch, tokens] of integers < 14."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(14, 10)
        self.head = nn.Linear(10, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)).mean(-2))


class PackedExperts(nn.Module):
    """Three expert MLPs in two packed parameters: up [3, 16, 12] and down [3, 12, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, WIDTH) / 12**0.5)
        self.down = nn.Parameter(torch.randn(3, WIDTH, 16) / 4)

    def forward(self, h: Tensor, gate: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("...i,eoi->...eo", h, self.up))
        return torch.einsum("...ei,eoi,...e->...o", hidden, self.down, gate)


class ExpertNet(_Classifier):
    """A softly gated mixture of packed experts with a head; x [..., 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = PackedExperts()
        self.head = nn.Linear(WIDTH, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(x + self.experts(x, torch.softmax(self.gate(x), -1)))


def _linear(rows: int, columns: int, bias: bool) -> nn.Module:
    return nn.Linear(rows, columns, bias=bias)


def _transposed(rows: int, columns: int, bias: bool) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    made = Conv1D(columns, rows)  # it always has a bias
    with torch.no_grad():
        made.weight.mul_(8)  # from N(0, 0.02^2): too little for methods that only turn W
    return made


def tiny_llama(**changes: Any) -> nn.Module:
    """A two-layer Llama of width 16, its weights large enough for logits that matter.

    Its norms keep float64, which finite differences need (transformers' own round to float32).
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
        "initializer_range": 0.25,
        "use_cache": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    for layer in model.model.layers:
        layer.input_layernorm = nn.RMSNorm(16, eps=1e-6)
        layer.post_attention_layernorm = nn.RMSNorm(16, eps=1e-6)
    model.model.norm = nn.RMSNorm(16, eps=1e-6)
    return model


@dataclass(frozen=True)
class Subject:
    """One kind of site: a model that has it, its input, and the targets that pick it."""

    kind: str
    """The site kind that a method must declare."""
    build: Callable[[], nn.Module]
    targets: Targets
    shape: tuple[int, ...]
    """Of one row of the input."""
    tokens: int = 0
    """Inputs are integers below this; 0: they are real numbers."""
    input_name: str = "x"


SUBJECTS: dict[str, Subject] = {
    "linear": Subject("linear", lambda: ResidualNet(_linear), "all-linear", (WIDTH,)),
    "transposed-linear": Subject(
        "linear", lambda: ResidualNet(_transposed), "all-linear", (WIDTH,)
    ),
    "conv": Subject("conv", ConvNet, "all-conv", (4, 6, 6)),
    "embedding": Subject("embedding", TokenNet, "embeddings", (5,), tokens=14),
    "parameter": Subject("parameter", ExpertNet, "experts", (3, WIDTH)),
    "module": Subject("module", tiny_llama, "blocks", (5, 16), input_name="inputs_embeds"),
}


def get_subject(kind: str) -> Subject:
    if kind not in SUBJECTS:
        raise unknown("kind of site", kind, SUBJECTS)
    return SUBJECTS[kind]


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base model for one kind of site, always the same one, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        model = get_subject(kind).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model.to(dtype).eval()
