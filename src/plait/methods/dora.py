"""DoRA: LoRA on the direction of every row of W, and a free length for it.

    x ──► V = W + s B A ──► * m_j / ||v_j|| for output j ──► + b

dW = diag(m / n) (W + s B A) - W, with n_j = ||w_j + s b_j A|| the row lengths of V (over input and
kernel axes), a constant to the gradient, as in the paper. m [out] starts at the row lengths of W,
so that with B = 0 training starts at the base model. Neither V nor B A is ever formed: ||w_j||^2 is
computed once, and

    n_j^2 = ||w_j||^2 + 2 s b_j . (W A^T)_j + s^2 b_j (A A^T) b_j^T

With dropout the change, W's part of it included, is computed from the dropped x, as in the paper's
code; that costs a second base product in training.
Paper: Liu et al., 2024, arXiv 2402.09353. Parameters: r (in + out) + out a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait import kernels
from plait.adapter import Method, PairDelta, PairOptions, Site, Traits, add_change, per_site
from plait.adapter.formats.peft_codec import pair_codec
from plait.adapter.site import LinearSite, base_class, first_input
from plait.linalg import LowRank
from plait.linalg.precision import accumulator_dtype
from plait.methods._rescale import rescale


@dataclass(frozen=True)
class DoraOptions(PairOptions):
    """LoRA's options; the paper halves LoRA's rank at equal quality."""


class DoraDelta(PairDelta):
    traits = Traits(depends_on_base=True, reads_output=True)
    gradient_is_exact = False  # n is a constant to the gradient
    options: DoraOptions
    m: Tensor
    squares: Tensor

    def build(self) -> None:
        super().build()
        self.parameter("m", self.site.out_features)

    def reset(self) -> None:
        super().reset()
        with torch.no_grad():
            self.m.copy_(self._squares().sqrt())

    def attached(self) -> None:
        self.seeded_value("squares", self._squares())

    def seeded_tensors(self) -> dict[str, Tensor]:
        return {}  # `squares` follows from W and not from the seed

    def _squares(self) -> Tensor:
        """||w_j||^2 [out], without a copy of W."""
        weight = self.site.weight().detach()
        return torch.linalg.vector_norm(weight, dim=1, dtype=self.m.dtype).square()

    def factors(self) -> None:  # type: ignore[override]
        return None  # dW has full rank; `_pair` is the low-rank part inside

    def _pair(self) -> LowRank:
        return PairDelta.factors(self)

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """n [out], the row lengths of W + s B A."""
        low = self._pair()
        W = self.site.weight()
        B, A = low.B * low.scale, low.A
        cross = (W @ A.t().to(W.dtype)).to(B.dtype)
        wide = A.to(accumulator_dtype(A.device))
        gram = (wide @ wide.t()).to(B.dtype)
        square = self.squares + (B * (2 * cross + B @ gram)).sum(1)
        # A row of V that vanished would divide by zero.
        return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()

    def _stretch(self) -> Tensor:
        """m / n - 1 [out]."""
        return self.m / self.lengths() - 1

    def dense(self) -> Tensor:
        stretch, product = self._stretch()[:, None], self._pair().dense()
        return stretch * (self.base_weight() + product) + product

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        drop = self.dropout if x.is_floating_point() else 0.0
        dropped = F.dropout(x, drop) if drop else x
        if y is None or drop:
            base = self.site.apply(dropped, self.site.weight())
        else:
            bias = self.site.bias()
            base = y if bias is None else y - self._along(bias, y)
        low = self._pair()
        B = (low.B * low.scale).to(base.dtype)
        change = self.site.apply_low_rank(dropped, low.A.to(base.dtype), B)
        stretch = self._along(self._stretch().to(base.dtype), base)
        return stretch * (base + change) + change

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        x = first_input(args, kwargs)
        if self.dropout or not _is_plain_linear(self.site):
            y = self.site.forward(*args, **kwargs)
            return add_change(y, lambda out: self.forward(x, out))
        low, bias = self._pair(), self.site.bias()
        z = kernels.lora_linear(x, self.site.weight(), None, low.A, low.B, low.scale)
        y = rescale(z, self._stretch())
        return y if bias is None else y + bias.to(y.dtype)

    def _along(self, channels: Tensor, y: Tensor) -> Tensor:
        """A vector [out] shaped to multiply y, whose channels come first in a convolution."""
        if self.site.kind != "conv":
            return channels
        return channels.reshape(-1, *([1] * (y.dim() - 2)))


def _is_plain_linear(site: Site) -> bool:
    module = site.base
    plain = base_class(module).forward is nn.Linear.forward
    return isinstance(site, LinearSite) and plain and site.weight().is_floating_point()


def _count(site: Site, o: DoraOptions) -> int:
    return o.rank * (site.in_features + site.out_features) + site.out_features


METHOD = Method(
    name="dora",
    title="DoRA: weight-decomposed low-rank adaptation",
    paper="Liu et al., 2024, arXiv 2402.09353",
    axis="parameterisation",
    options=DoraOptions,
    delta=DoraDelta,
    count=per_site(_count),
    peft=pair_codec(marks={"use_dora": True}, vectors={"m": "lora_magnitude_vector"}),
)
