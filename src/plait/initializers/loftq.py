"""LoftQ: quantise W and start a pair at what quantising lost, in turns, until both fit together.

    Q_t = quant(W - s B_{t-1} A_{t-1})        s B_t A_t = best rank r of W - Q_t

so that Q + s B A is closer to W than quant(W) is. The turns do not always improve: the best is
kept. What becomes of the base is `base`:
"keep": nothing. The start is held back in the adapter as PiSSA's is, so that W stays what it is,
the model starts at it and the pair trains the directions in which a quantised base errs.
"replace": W is overwritten with Q, for good, and the pair makes up for it: the adapter belongs to
that base from then on, so save both (`model.save_pretrained`). Refused beside other adapters.
Where the base is quantised already, `originals` gives the weights it was made from: Q is then what
the site has, nothing is overwritten, and one SVD finds the pair.
Works with any method that trains a pair, and any `plait.quantization.Quantizer`.
Paper: Li et al., 2023, arXiv 2310.08659. Parameters: r (in + out) a site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.adapter import Delta, Initializer, Method, PairDelta, Site, adapters
from plait.adapter.choices import check_choices
from plait.errors import PlaitError, unknown
from plait.initializers._pairs import require_pair, set_leading
from plait.linalg import randomized_svd
from plait.methods.lora import METHOD as LORA
from plait.methods.lora import LoraDelta, LoraOptions
from plait.quantization import BlockQuantizer, Quantizer


@dataclass
class Loftq(Initializer):
    quantizer: Quantizer = field(default_factory=BlockQuantizer)
    """What the base is, or will be, quantised with; NF4 in blocks of 64."""
    iterations: int = 5
    """Turns of quantising and decomposing (paper: 5; PEFT: 1)."""
    base: Literal["keep", "replace"] = "keep"
    """Whether W stays, or becomes Q."""
    originals: Mapping[str, Tensor] | None = None
    """{site path: W [out, in]} for a base that is quantised already."""
    svd: Literal["randomized", "exact"] = "randomized"
    """The fast SVD of the error, or the full one."""
    niter: int = 4
    """Power iterations of the randomised SVD; a quantisation error's spectrum is nearly flat."""

    def __post_init__(self) -> None:
        check_choices(self, "loftq")
        if self.iterations < 1:
            raise PlaitError(f"loftq: iterations must be at least 1, not {self.iterations}.")
        if self.base == "replace" and self.originals is not None:
            raise PlaitError("loftq: originals= are for a base that is quantised; leave base=.")

    def collect(
        self, model: nn.Module, sites: Sequence[Site], data: Iterable[Any] | None, rank: int
    ) -> dict[str, Any]:
        others = list(adapters(model))
        if self.base == "replace" and others:
            raise PlaitError(
                f"loftq would overwrite weights that adapter {others[0]!r} was made for; detach "
                "it first, or leave base='keep'."
            )
        return {}

    def start(self, delta: Delta, statistics: Any) -> None:
        pair = require_pair(delta, "loftq")
        if not pair.site.weight().is_floating_point():
            raise PlaitError(f"loftq: the base at {pair.site.path!r} is packed; dequantise it.")
        if self.originals is not None:
            if pair.site.path not in self.originals:
                raise unknown("site", pair.site.path, self.originals, where="loftq's originals")
            W = self.originals[pair.site.path].to(pair.device, pair.dtype)
            self._set(pair, *self._decompose(pair, W - pair.base_weight()))
            return
        Q, A, B = self._alternate(pair)
        self._set(pair, A, B)
        if self.base == "keep":
            pair.hold_back()
        else:
            overwrite(pair.site, Q)

    def _alternate(self, pair: PairDelta) -> tuple[Tensor, Tensor, Tensor]:
        """Q, A and B of the turn that came closest to W, with B A unscaled."""
        W, best = pair.base_weight(), None
        change, least = torch.zeros_like(W), float("inf")
        for _ in range(self.iterations):
            Q = self.quantizer.quantize(W - change)
            A, B = self._decompose(pair, W - Q)
            change = B @ A
            error = float((W - Q - change).norm())
            if best is None or error < least:
                best, least = (Q, A, B), error
        assert best is not None
        return best

    def _decompose(self, pair: PairDelta, error: Tensor) -> tuple[Tensor, Tensor]:
        rank = min(pair.rank, *error.shape[-2:])
        if self.svd == "exact":
            U, S, Vh = torch.linalg.svd(error, full_matrices=False)
        else:
            g = pair.generator("loftq")
            U, S, Vh = randomized_svd(error, rank, power_iterations=self.niter, generator=g)
        root = S[..., :rank].sqrt()
        return root.unsqueeze(-1) * Vh[..., :rank, :], U[..., :rank] * root.unsqueeze(-2)

    def _set(self, pair: PairDelta, A: Tensor, B: Tensor) -> None:
        root = pair.scaling**0.5  # each factor takes half of 1 / s
        set_leading(pair, A / root, B / root)


def overwrite(site: Site, weight: Tensor) -> None:
    """Write a canonical weight into the module, in the layout that it stores."""
    stored = site.base.get_parameter(getattr(site, "parameter_name", "weight"))
    stored.copy_(site.replacement(weight))


METHOD = Method(
    name="loftq",
    title="LoftQ: a start that makes up for a quantised base",
    paper="Li et al., 2023, arXiv 2310.08659",
    axis="initialisation",
    options=LoraOptions,
    delta=LoraDelta,
    count=LORA.count,
    initializer=Loftq,
)
