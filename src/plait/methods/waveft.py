"""WaveFT: dW is one level of a wavelet synthesis of a few trained coefficients.

    dW = scaling * R_out C R_in^T     C holds c [n] at n random places and zeros elsewhere

    x ──wavelet analysis R_in^T──► sparse product with C ──synthesis R_out──► + W x

Each coefficient moves a patch of L x L entries (L = 2 for the Haar wavelet "db1"), in one quarter
of C as an average and in the others as a difference. The places are drawn from `location_seed` and
the same at all sites of one shape. dW is never formed: a token costs n + L (in + out)
multiplications, as much in backward for x, and n for c; a sparse product with dW itself would cost
L^2 n. Where a device has no sparse products dW is formed. c = 0 at the start.
`wavelet=None` leaves the transform out: c are then entries of dW.
Paper: Bilican et al., 2025, arXiv 2505.12532. Parameters: n a site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plait.adapter import Delta, Method, Options, per_site
from plait.adapter.formats.peft_codec import one_value
from plait.kernels._gate import plain_path
from plait.methods._locations import places, spectrum_codec
from plait.methods._ranges import check_ranges
from plait.methods._sparse import Layout, has_sparse, make_layout, sparse_linear
from plait.methods._transformed import transformed_linear
from plait.methods._wavelet import Wavelets, filters, padded, quarters


@dataclass(frozen=True)
class WaveftOptions(Options):
    coefficients: int = 2592
    """Trained coefficients n a site (paper: 2592, as many as LoRA of rank 1 has on SDXL)."""
    scaling: float = 25.0
    """Factor on dW (paper: 25)."""
    wavelet: str | None = "db1"
    """Daubechies' wavelet "db1" (Haar) to "db10", or None for no transform."""
    location_seed: int = 777
    """Seed of the places, a fixed option so that every site of one shape has the same ones."""

    def __post_init__(self) -> None:
        check_ranges(self, "coefficients")
        if self.wavelet is not None:
            filters(self.wavelet)


class WaveftDelta(Delta):
    options: WaveftOptions
    spectrum: Tensor
    places: Tensor
    _wavelets: Wavelets | None

    def build(self) -> None:
        name, (rows, columns) = self.options.wavelet, self.site.shape
        self.parameter("spectrum", self.options.coefficients)
        drawn = places(self.site, self.options.coefficients, self.options.location_seed)
        self._size, self._wavelets = (rows, columns), None
        if name is not None:
            self._size = (padded(rows, name), padded(columns, name))
            self._wavelets = Wavelets(name, (rows, columns))
            drawn = quarters(drawn, self.site.shape, self._size)
        self.seeded_value("places", drawn)
        self._pattern: tuple[Any, Layout, Tensor] | None = None

    def _layout(self) -> tuple[Layout, Tensor]:
        """C's pattern and the coefficients' order in it, made again when the places have moved."""
        device = self.places.device
        if self._pattern is None or self._pattern[0] != device:
            flat, order = self.places.sort()
            self._pattern = (device, make_layout(flat, *self._size), order)
        return self._pattern[1:]

    def dense(self) -> Tensor:
        flat = self.spectrum.new_zeros(self._size[0] * self._size[1])
        C = flat.index_copy(0, self.places, self.spectrum * self.options.scaling).view(self._size)
        return C if self._wavelets is None else self._wavelets.dense(C)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if plain_path(x, self.spectrum) or not has_sparse(x.device):
            return super().forward(x, y)
        layout, order = self._layout()
        values = (self.spectrum * self.options.scaling)[order]
        if self._wavelets is None:
            return sparse_linear(x, values, layout)
        return transformed_linear(x, values, layout, self._wavelets)


def _read(config: dict[str, Any]) -> dict[str, Any]:
    transformed = config.get("use_idwt", True)
    return {"wavelet": config.get("wavelet_family", "db1") if transformed else None}


def _write(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    name = one_value(deltas, "wavelet")
    return {"wavelet_family": name or "db1", "use_idwt": name is not None}


METHOD = Method(
    name="waveft",
    title="WaveFT: fine-tuning sparse wavelet coefficients",
    paper="Bilican et al., 2025, arXiv 2505.12532",
    axis="parameterisation",
    options=WaveftOptions,
    delta=WaveftDelta,
    count=per_site(lambda site, o: o.coefficients),
    peft=spectrum_codec(
        "WAVEFT",
        "waveft_spectrum",
        read=_read,
        write=_write,
        settings=("wavelet_family", "use_idwt", "proportional_parameters"),
    ),
    example={"coefficients": 24, "scaling": 1.0},
)
