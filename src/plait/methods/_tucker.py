"""The Tucker form of a convolution's kernel: channel maps around a core of small kernels.

    kernel[p, q] = sum_ij a[i, p] b[j, q] t[i, j]      t [r, r, k, k], a [r, out], b [r, in]

FedPara's third proposition (Hyeon-Woo et al., 2021, arXiv 2108.06098), what LyCORIS calls Tucker
and PEFT use_effective_conv2d: r^2 k^2 + r (out + in) numbers where a flat factor takes r (out +
in k^2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plait.adapter import Site


def has_core(site: Site) -> bool:
    """Whether there is a kernel to keep apart: a 1 x 1 convolution is a linear map."""
    return site.kind == "conv" and math.prod(site.details["kernel"][1:]) > 1


def tucker_product(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[out, in k k], the kernel unrolled as a site's weight is."""
    return torch.einsum("ij...,ip,jq->pq...", t, a, b).flatten(1)
