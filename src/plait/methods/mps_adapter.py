"""MPS adapter: dW as a matrix product state, a chain of small cores bound by chi-wide bonds.

    n_1   n_2         n_3   n_4
     |     |           |     |
    G_1 ─ G_2 ──chi── G_3 ─ G_4        out = n_1 n_2, in = n_3 n_4 for `modes` = 2, row-major

dW = s reshape(G_1 G_2 .. G_L), G_k [chi_{k-1}, n_k, chi_k], chi_0 = chi_L = 1, s = alpha / chi.
The bond between rows and columns makes dW a product B A of rank chi whose factors are chains
themselves, so a site contracts B [out, chi] and A [chi, in] from the cores and rides LoRA's kernel.
With `modes` = 1 this is LoRA of rank chi. Across every cut of the chain dW has at most chi singular
values, an entanglement entropy of at most ln chi (`plait.linalg.entanglement`). Bonds are never
wider than what stands on either side of them. The last core is zero at the start, the others
left-canonical: orthonormal columns as [chi_{k-1} n_k, chi_k].
Paper: Chen et al., 2026, arXiv 2601.06788. Parameters: the sum of chi_{k-1} n_k chi_k a site.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from plait.adapter import Delta, Method, PairOptions, Site, Traits, per_site, seeds
from plait.linalg import LowRank
from plait.methods._modes import split_side
from plait.methods._ranges import check_ranges


@dataclass(frozen=True)
class MpsAdapterOptions(PairOptions):
    rank: int = 16
    """Widest bond chi, and so the rank of dW (paper's range: 4 to 32)."""
    modes: int = 3
    """Cores a side; the sides are cut into near-equal sizes (paper's range: 2 to 6)."""
    sigma: float | None = None
    """Draw the cores from N(0, sigma^2) instead of left-canonical ones."""

    def __post_init__(self) -> None:
        check_ranges(self, "rank", "modes")

    def shapes(self, site: Site) -> list[tuple[int, int, int]]:
        """The shapes of the cores at a site."""
        sizes = [n for side in site.shape for n in split_side(side, self.modes)]
        cuts = range(len(sizes) + 1)
        bonds = [min(math.prod(sizes[:c]), math.prod(sizes[c:]), self.rank) for c in cuts]
        return list(zip(bonds[:-1], sizes, bonds[1:], strict=True))


class MpsAdapterDelta(Delta):
    traits = Traits(low_rank=True)
    options: MpsAdapterOptions

    def build(self) -> None:
        for k, shape in enumerate(self.options.shapes(self.site)):
            self.parameter(f"core{k}", *shape)

    def cores(self) -> list[Tensor]:
        """G_1 .. G_L."""
        return [self.get_parameter(f"core{k}") for k in range(2 * self.options.modes)]

    def reset(self) -> None:
        sigma = self.options.sigma
        for k, core in enumerate(self.cores()[:-1]):
            draw = seeds.orthogonal if sigma is None else seeds.normal
            value = draw((core[..., 0].numel(), core.shape[-1]), self.generator("start", str(k)))
            core.copy_((value if sigma is None else sigma * value).view(core.shape))

    def factors(self) -> LowRank:
        cores = self.cores()
        rows, columns = cores[: self.options.modes], cores[self.options.modes :]
        B, A = rows[0].flatten(0, 1), columns[-1].flatten(1)
        for core in rows[1:]:
            B = (B @ core.flatten(1)).view(-1, core.shape[2])
        for core in reversed(columns[:-1]):
            A = (core.flatten(0, 1) @ A).view(core.shape[0], -1)
        return LowRank(B=B, A=A, scale=self.options.scaling)


METHOD = Method(
    name="mps-adapter",
    title="MPS adapter: matrix product states as weight updates",
    paper="Chen et al., 2026, arXiv 2601.06788",
    axis="parameterisation",
    options=MpsAdapterOptions,
    delta=MpsAdapterDelta,
    count=per_site(lambda site, o: sum(math.prod(shape) for shape in o.shapes(site))),
    example={"rank": 3, "modes": 2},
)
