"""IntTune: NLoRA's start, of which only the small middle matrix is trained.

    x ──► A = r rows of W (frozen) ──► R (r x r, trained) ──► B = r columns of W (frozen) ──► + W x

dW = s B (R - R_0) A with s = 1 and R_0 the corner of W where those rows and columns meet: LoRA-XS
between slices of W instead of singular vectors, so that the start costs no SVD. The model starts at
the base, and dW has rank r (as A and B stand still, R_0 is all that needs to be held back). See
`nlora` for the authors' start beside the base, and for what else can be chosen:
`attach(model, "int-tune", initializer=Nystrom(residual=False))`. A and B are saved with R.
Paper: Guo et al., 2025, arXiv 2502.14482. Parameters: r^2 a site, whatever its width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plait.adapter import Method, Traits, per_site
from plait.initializers._cores import CoreDelta
from plait.initializers.nlora import Nystrom
from plait.linalg import LowRank
from plait.methods.structured_lora import StructuredLoraOptions


@dataclass(frozen=True)
class IntTuneOptions(StructuredLoraOptions):
    """StructuredLoRA's options (paper: rank 128, the same learning rate as NLoRA)."""


class IntTuneDelta(CoreDelta):
    traits = Traits(low_rank=True)
    R_0: Tensor

    def build(self) -> None:
        super().build()
        self.frozen("R_0", *self.R.shape)

    def trained(self) -> LowRank:
        return LowRank(B=self.B @ (self.R - self.R_0), A=self.A, scale=self.scaling)

    def hold_back(self) -> None:
        with torch.no_grad():
            self.R_0.copy_(self.R)


METHOD = Method(
    name="int-tune",
    title="IntermediateTune: only the middle matrix of NLoRA",
    paper="Guo et al., 2025, arXiv 2502.14482",
    axis="initialisation",
    options=IntTuneOptions,
    delta=IntTuneDelta,
    count=per_site(lambda site, o: o.rank**2),
    initializer=Nystrom,
    example={"rank": 5},
)
