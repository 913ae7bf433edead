"""PETL-AST: adapters beside the sublayers of an audio spectrogram transformer, with a convolution.

    conformer    x ──► norm ──► down (2k x d) ──► GLU ──► depthwise conv over K tokens
                   ──► batch norm ──► SiLU ──► up (d x k) ──► dropout ──► + y
    bottleneck   x ──► down (k x d) ──► gelu ──► up (d x k) ──► dropout ──► + y

y is the sublayer's output; x is its own input (parallel: what the layer norm before it gives) or y
(sequential). Pfeiffer's placement is the feed-forward sublayers, the default; Houlsby's adds
attention: targets=["attention", "mlp"]. The authors also train the layer norms beside the adapters
and the head: train_modules=["layernorm_after", "classifier"]. `up` and its bias start at 0, so that
training starts at the base model; the released bottleneck starts both projections at 0, from where
no weight ever moves. The released convolution block normalises its input and then reads the one
that is not normalised; here it reads what was normalised. The convolution looks both ways, so it
suits encoders, not decoding with a cache. Neither block is linear: no fusing, no LoRA export.
Paper: Cappellazzo et al., 2023, arXiv 2312.03694. Parameters: 3 k d + k (K + 4) + 3 d, or
2 k d + k + d, a sublayer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, Site, per_site
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.methods._blocks import FEED_FORWARD, Placement, residual_traits
from plait.methods._convolution import mix_tokens


@dataclass(frozen=True)
class AstPetlOptions(Options):
    block: Literal["conformer", "bottleneck"] = "conformer"
    """The convolution block that the paper proposes, or the plain one."""
    reduction: float = 64.0
    """Width d over the block's width k (paper: 64 to 128)."""
    rank: int | None = None
    """The block's width k itself, instead of `reduction`."""
    placement: Placement = "parallel"
    """Read the sublayer's input (paper: the better one) or its output."""
    residual: bool = False
    """Also add x itself to a parallel block's output; the model then starts elsewhere than the
    base (the paper advises against it). A sequential block always keeps what it reads."""
    kernel: int = 31
    """Tokens K that the convolution sees (8 to 31)."""
    dropout: float = 0.0
    """Probability of dropping a number of the block's output in training."""

    def __post_init__(self) -> None:
        check_choices(self, "ast-petl")
        if self.reduction <= 0 or self.kernel < 1 or (self.rank is not None and self.rank < 1):
            raise PlaitError("ast-petl: reduction must be above 0, kernel and rank at least 1.")
        if self.residual and self.placement == "sequential":
            raise PlaitError(
                "ast-petl: residual=True is for placement='parallel'; a sequential block keeps "
                "its input anyway."
            )

    def width(self, site: Site) -> int:
        return self.rank or max(1, round(site.out_features / self.reduction))


class AstPetlDelta(Delta):
    kinds = frozenset({"module"})
    traits = residual_traits("parallel")
    options: AstPetlOptions
    batch_scale: Tensor
    batch_shift: Tensor
    mean: Tensor
    variance: Tensor

    def build(self) -> None:
        o, d, k = self.options, self.site.out_features, self.options.width(self.site)
        self.traits = residual_traits(o.placement, zero_start=not o.residual)
        convolves = o.block == "conformer"
        hidden = 2 * k if convolves else k
        shapes = {"down": (hidden, d), "down_bias": (hidden,), "up": (d, k), "up_bias": (d,)}
        if convolves:
            shapes |= {"norm_scale": (d,), "norm_shift": (d,), "depthwise": (k, 1, o.kernel)}
            shapes |= {"batch_scale": (k,), "batch_shift": (k,)}
            self.frozen("mean", k)
            self.frozen("variance", k)
        for name, shape in shapes.items():
            self.parameter(name, *shape)

    def reset(self) -> None:
        self.start("down", "kaiming_uniform")
        if self.options.block == "conformer":
            self.start("depthwise", "kaiming_uniform")
            for name in ("norm_scale", "batch_scale"):
                torch.nn.init.ones_(self.get_parameter(name))
            self.variance.fill_(1.0)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """What is added to the sublayer's output, for x [..., tokens, d]."""
        own = {name: p.to(x.dtype) for name, p in self.named_parameters()}
        if self.options.block == "conformer":
            hidden = F.layer_norm(x, x.shape[-1:], own["norm_scale"], own["norm_shift"])
            hidden = F.glu(F.linear(hidden, own["down"], own["down_bias"]))
            batch = self.mean, self.variance, self.batch_scale, self.batch_shift
            hidden = mix_tokens(hidden, own["depthwise"], *batch, training=self.training)
        else:
            hidden = F.gelu(F.linear(x, own["down"], own["down_bias"]))
        change = F.linear(hidden, own["up"], own["up_bias"])
        change = F.dropout(change, self.dropout) if self.dropout else change
        return x + change if self.options.residual else change


def _count(site: Site, o: AstPetlOptions) -> int:
    d, k = site.out_features, o.width(site)
    if o.block == "bottleneck":
        return 2 * k * d + k + d
    return 3 * k * d + k * (o.kernel + 4) + 3 * d


METHOD = Method(
    name="ast-petl",
    title="PETL-AST: bottleneck and convolution adapters for spectrogram transformers",
    paper="Cappellazzo et al., 2023, arXiv 2312.03694",
    axis="parameterisation",
    options=AstPetlOptions,
    delta=AstPetlDelta,
    count=per_site(_count),
    targets=FEED_FORWARD,
    example={"rank": 4, "kernel": 3},
)
