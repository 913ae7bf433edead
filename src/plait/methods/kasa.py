"""KaSA: drop the r weakest singular directions of W, and learn a change with singular values.

    x ──► A (r x in) ──► * e_i ──► B (out x r) ──► * s ──► + W_svd x

dW = s B diag(e) A - W_cut, where W_cut is W's part in its r smallest singular directions, which the
paper takes for noise. W itself is not touched: the cut is saved in the adapter as a frozen pair of
rank r, so that other adapters keep their base, detaching gives W back, and dW exports exactly as a
LoRA of rank 2r. A starts at Kaiming's uniform distribution, e at N(0, 1) and B at zero: training
starts at the truncated model. With dropout the cut part sees the dropped x too.
`auxiliary_loss` (in every rule stack and trainer) keeps the change near an SVD, mean over sites:

    beta ||e||^2 + gamma (||B^T B - I||_F + ||A A^T - I||_F)

on the r x r Gram matrices, as in the paper; the authors' code compares A^T A [in, in] with I, which
no A can meet. That code keeps in - r directions, so that where out < in it cuts nothing; here r of
min(out, in) go. In small models those are no noise everywhere: a warning says where it costs more
than 2 % of W (on SmolLM2-135M benchmarks/train_every_method.py sees a first loss of 8.8 where
LoRA's is 3.9).
Paper: Wang et al., 2024, arXiv 2412.06071. Parameters: r (in + out + 1) a site.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.adapter import Context, Delta, Method, PairDelta, PairOptions, Traits, per_site
from plait.adapter.pair import Pair
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.methods._kasa_peft import CODEC
from plait.methods._smallest import smallest_part

MUCH = 0.02
WARNING = (
    f"KaSA cuts more than {MUCH:.0%} of W's norm at some sites: their smallest singular directions "
    "are not noise, and training starts at a damaged model; truncate=False leaves them."
)


@dataclass(frozen=True)
class KasaOptions(PairOptions):
    truncate: bool = True
    """Cut W's r smallest singular directions; without it the change alone is learned."""
    beta: float = 1e-4
    """Weight of the penalty on e (paper: 1e-4; 1e-6 to 1 by task)."""
    gamma: float = 1e-3
    """Weight of the penalties that keep A and B orthonormal (paper: 1e-3)."""


class KasaDelta(PairDelta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True, zero_start=False)
    options: KasaOptions
    e: Tensor

    def build(self) -> None:
        super().build()
        rank, shape = self.options.rank, self.site.shape
        self.parameter("e", rank)
        if not self.options.truncate:
            self.traits = Traits(low_rank=True)
            return
        if rank >= min(shape):
            raise PlaitError(
                f"rank {rank} would cut all of {self.site.path!r} {list(shape)} away; lower it "
                "there with overrides=, or truncate=False."
            )
        self.frozen("cut_A", rank, self.site.in_features)
        self.frozen("cut_B", self.site.out_features, rank)

    def reset(self) -> None:
        super().reset()
        self.start("e", "normal")
        self.cut()

    @torch.no_grad()
    def cut(self) -> None:
        """Find W_cut = cut_B cut_A (needs the base weight)."""
        if self.options.truncate:
            W = self.site.weight().detach()
            B, A = smallest_part(W, self.options.rank)
            if LowRank(B=B, A=A).norm() > MUCH * torch.linalg.vector_norm(W):
                warnings.warn(WARNING, stacklevel=2)
            self.get_buffer("cut_A").copy_(A)
            self.get_buffer("cut_B").copy_(B)

    def trained(self) -> LowRank:
        return LowRank(B=self.B * self.e, A=self.A, scale=self.scaling)

    def factors(self) -> LowRank:
        if not self.options.truncate:
            return self.trained()
        B = torch.cat([self.B * (self.scaling * self.e), -self.get_buffer("cut_B")], dim=1)
        return LowRank(B=B, A=torch.cat([self.A, self.get_buffer("cut_A")]))

    def pairs(self) -> list[Pair]:
        return []  # s B A is not dW: what is made for such pairs would be wrong here

    def regularization(self) -> Tensor:
        """The penalty at this site, without the mean over sites."""
        eye = torch.eye(len(self.e), dtype=self.e.dtype, device=self.e.device)
        grams = torch.stack([self.B.mT @ self.B, self.A @ self.A.mT])
        orthogonality = torch.linalg.matrix_norm(grams - eye).sum()
        return self.options.beta * self.e.square().sum() + self.options.gamma * orthogonality

    @classmethod
    def auxiliary_loss(cls, deltas: Sequence[Delta], context: Context) -> Tensor | None:
        ours = [d for d in deltas if isinstance(d, KasaDelta)]
        terms = [d.regularization() for d in ours if d.options.beta or d.options.gamma]
        return torch.stack(terms).sum() / len(ours) if terms else None


METHOD = Method(
    name="kasa",
    title="KaSA: knowledge-aware singular-value adaptation",
    paper="Wang et al., 2024, arXiv 2412.06071",
    axis="parameterisation",
    options=KasaOptions,
    delta=KasaDelta,
    count=per_site(lambda site, o: o.rank * (site.in_features + site.out_features + 1)),
    peft=CODEC,
)
