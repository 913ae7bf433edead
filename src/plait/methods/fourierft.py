"""FourierFT: dW is the inverse Fourier transform of a few trained coefficients.

    dW = scaling * Re(ifft2(F))     F [out, in] holds c [n] at n random places and zeros elsewhere

    x ──rfft──► frequencies of in ──sparse product──► frequencies of out ──irfft──► + W x

The places are drawn from `location_seed` and the same at all sites of one shape. dW is never
formed: a token costs real transforms of x, y, dy, dx and x again and 12 n operations of sparse
products, at n = 1000 a twelfth (768 x 768) to a sixtieth (4096 x 4096) of what forming W + dW
costs, whose gradient alone takes 2 in out operations a token. Where a device has no sparse products
dW is formed. The start is c ~ N(0, 1), as in the paper: near the base model for wide layers, but
not at it; `start="zeros"` is, and c has a gradient there.
Paper: Gao et al., 2024, arXiv 2405.03003. Parameters: n a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from plait.adapter import Delta, Method, Options, Traits, per_site
from plait.adapter.choices import check_choices
from plait.kernels._gate import plain_path
from plait.methods._fourier import Spectrum, make_spectrum
from plait.methods._locations import places, spectrum_codec
from plait.methods._ranges import check_ranges
from plait.methods._sparse import has_sparse
from plait.methods._transformed import transformed_linear


@dataclass(frozen=True)
class FourierftOptions(Options):
    coefficients: int = 1000
    """Trained coefficients n a site (paper: 1000 for language models)."""
    scaling: float = 150.0
    """Factor on dW (paper: 100 to 300)."""
    location_seed: int = 777
    """Seed of the places, a fixed option so that every site of one shape has the same ones."""
    start: Literal["normal", "zeros"] = "normal"
    """Distribution of the coefficients at the start."""

    def __post_init__(self) -> None:
        check_choices(self, "fourierft")
        check_ranges(self, "coefficients")


class FourierftDelta(Delta):
    traits = Traits(zero_start=False)
    options: FourierftOptions
    spectrum: Tensor
    places: Tensor

    def build(self) -> None:
        self.traits = Traits(zero_start=self.options.start == "zeros")
        self.parameter("spectrum", self.options.coefficients)
        drawn = places(self.site, self.options.coefficients, self.options.location_seed)
        self.seeded_value("places", drawn)
        self._folded: tuple[Any, Spectrum] | None = None

    def reset(self) -> None:
        if self.options.start == "normal":
            self.start("spectrum", "normal")

    def _plan(self) -> Spectrum:
        """The places folded for the transforms, made again when they have moved."""
        device = self.places.device
        if self._folded is None or self._folded[0] != device:
            self._folded = (device, make_spectrum(self.places, *self.site.shape))
        return self._folded[1]

    def dense(self) -> Tensor:
        return self._plan().dense(self.spectrum * self.options.scaling)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if plain_path(x, self.spectrum) or not has_sparse(x.device):
            return super().forward(x, y)
        plan = self._plan()
        values = plan.values(self.spectrum * self.options.scaling)
        return transformed_linear(x, values, plan.layout, plan)


METHOD = Method(
    name="fourierft",
    title="FourierFT: fine-tuning with a discrete Fourier transform",
    paper="Gao et al., 2024, arXiv 2405.03003",
    axis="parameterisation",
    options=FourierftOptions,
    delta=FourierftDelta,
    count=per_site(lambda site, o: o.coefficients),
    peft=spectrum_codec("FOURIERFT", "fourierft_spectrum"),
    example={"coefficients": 24, "scaling": 30.0},
)
