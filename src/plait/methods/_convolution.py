"""The middle of a Conformer's convolution module: tokens mixed, each channel by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MOMENTUM = 0.1
"""Share of a training batch in the running mean and variance, as in nn.BatchNorm1d."""


def mix_tokens(
    x: Tensor,
    kernel: Tensor,
    mean: Tensor,
    variance: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    training: bool,
) -> Tensor:
    """silu(batch norm(depthwise convolution over the tokens of x [..., tokens, k])).

    `kernel` is [k, 1, K]; the ends are padded with zeros, so that tokens stay as many. `mean` and
    `variance` [k] are the running ones: read in evaluation, updated in training.
    """
    size = kernel.shape[-1]
    channels = x.reshape(-1, *x.shape[-2:]).mT
    padded = F.pad(channels, ((size - 1) // 2, size // 2))
    mixed = F.conv1d(padded, kernel, groups=kernel.shape[0])
    # Gradient checkpointing runs this again in backward: the batch must count once.
    again = torch._C._current_graph_task_id() != -1
    momentum = 0.0 if again else MOMENTUM
    normal = F.batch_norm(
        mixed.to(mean.dtype), mean, variance, scale, shift, training=training, momentum=momentum
    )
    return F.silu(normal).to(x.dtype).mT.reshape(x.shape)
