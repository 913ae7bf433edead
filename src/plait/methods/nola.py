"""NOLA: LoRA factors as mixes of random matrices that exist only while they are summed.

    A = A_0 + sum_i a_i M_i      B = sum_j b_j N_j      dW = s B A

M_i [r, in] and N_j [out, r] have entries U(-1, 1) / sqrt(k) and are regenerated, a cache-sized
block at a time, in forward and again in backward (grad a_i = <dL/dA, M_i>). Only a [k_a] and
b [k_b] train, both from 0, so that training starts at the base model; A_0 is frozen, U(-1/sqrt(in),
1/sqrt(in)), and drawn from the seed too: the seed and the coefficients are the whole adapter.
The entries are a hash of their position and the seed, on a grid of 2^-15: the same bits on every
device and in every version, with no random state to disturb.
Paper: Koohpayegani et al., 2023, arXiv 2310.02556. Parameters: k_a + k_b a site, whatever r and W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from plait.adapter import Delta, Method, PairOptions, Traits, per_site
from plait.errors import PlaitError
from plait.kernels._gate import plain_path
from plait.linalg import LowRank
from plait.methods._hashed import Key, basis, blocks


@dataclass(frozen=True)
class NolaOptions(PairOptions):
    k_a: int = 128
    """Random matrices that A is mixed from (paper: 128 for LLaMA, 1024 for GPT-2)."""
    k_b: int = 128
    """Random matrices that B is mixed from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.k_a, self.k_b) < 1:
            raise PlaitError(f"k_a and k_b must be at least 1, not {self.k_a} and {self.k_b}.")


class NolaDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True)
    options: NolaOptions
    a: Tensor
    b: Tensor
    A0: Tensor

    def build(self) -> None:
        self.seeded("A0", "kaiming_uniform", self.options.rank, self.site.in_features)
        self.parameter("a", self.options.k_a)
        self.parameter("b", self.options.k_b)
        self._keys = {name: self._key(name) for name in ("M", "N")}

    def _key(self, name: str) -> Key:
        g = self.generator(name)
        first, second = torch.randint(-(2**31), 2**31, (2,), generator=g).tolist()
        return first, second

    def factors(self) -> LowRank:
        rank, (rows, columns) = self.options.rank, self.site.shape
        A = self.A0 + mix(self.a, self._keys["M"], (rank, columns))
        B = mix(self.b, self._keys["N"], (rows, rank))
        return LowRank(B=B, A=A, scale=self.options.scaling)


def mix(coefficients: Tensor, key: Key, shape: tuple[int, int]) -> Tensor:
    """sum_i coefficients_i M_i / sqrt(k) [shape], for the k random matrices of `key`."""
    if plain_path(coefficients):
        M = basis(key, 0, len(coefficients), math.prod(shape), coefficients.device)
        weights = coefficients / math.sqrt(len(coefficients))
        return (weights @ M.to(coefficients.dtype)).reshape(shape)
    return _Mix.apply(coefficients, key, shape)


class _Mix(Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, key: Key, shape: tuple[int, int]) -> Tensor:
        ctx.settings = (key, coefficients.shape, coefficients.dtype)
        total = coefficients.new_zeros(math.prod(shape))
        scaled = coefficients / math.sqrt(len(coefficients))
        for rows, block in blocks(key, len(coefficients), total):
            total.addmv_(block.t(), scaled[rows])
        return total.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        key, shape, dtype = ctx.settings
        flat = grad.reshape(-1).to(dtype)
        found = grad.new_empty(shape, dtype=dtype)
        for rows, block in blocks(key, len(found), flat):
            found[rows] = block.mv(flat)
        return found.div_(math.sqrt(len(found))), None, None


METHOD = Method(
    name="nola",
    title="NOLA: networks as linear combination of low rank random basis",
    paper="Koohpayegani et al., 2023, arXiv 2310.02556",
    axis="parameterisation",
    options=NolaOptions,
    delta=NolaDelta,
    count=per_site(lambda site, o: o.k_a + o.k_b),
)
