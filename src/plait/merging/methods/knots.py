"""KnOTS: bring adapters into a shared basis by a joint SVD, merge them there entry by entry.

    [dW_1 .. dW_k] = U S [V_1^T .. V_k^T]     C_i = S V_i^T      dW = U inner(C_1, .., C_k)

Adapters of different tasks are poorly aligned, entry by entry; their coordinates in a basis that
all of them fill are better. U comes from the factors (see `plait.merging.spaces.align`), so nothing
of the matrix's size is decomposed, and the result is of low rank: U and the merged coordinates are
its factors. This is what space `aligned` is; the method gives it the paper's name, any inner method
with that space, and the other side: a basis of the inputs instead of the outputs.
Paper: Stoica et al., 2024, arXiv 2410.19735. Departure: shares of entries are taken site by site,
not over the whole model, where sites of large changes would keep all of theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.changes import Changes
from plait.merging.method import Merge, MergeMethod, get_merge_method, make_merge
from plait.merging.spaces import merge_site


@dataclass
class Knots(Merge):
    inner: str = "ties"
    """The method that merges the coordinates (paper: ties; or dare, with elect)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The inner method's own (paper, of ties: density 0.2 to 0.3)."""
    side: Literal["outputs", "inputs"] = "outputs"
    """The basis is of the outputs (paper), or of the inputs."""
    scale: float = 1.0
    """Factor on the result (paper: swept; 0.6 is its example)."""

    spaces = ("factors",)

    def __post_init__(self) -> None:
        check_choices(self, "knots")
        method = get_merge_method(self.inner)
        self._way = make_merge(method, self.options)
        if "aligned" not in self._way.spaces:
            raise PlaitError(
                f"knots: {method.name!r} does not work entry by entry on coordinates with these "
                "options; choose an inner method with space 'aligned', such as 'ties'."
            )
        self.needs = self._way.needs
        if self.needs and self.side == "inputs":
            raise PlaitError(
                f"knots: the statistics of {method.name!r} are of the inputs as they are; use "
                "side='outputs' with it."
            )

    def merge(self, lows: Sequence[LowRank], weights: Sequence[float], changes: Changes) -> LowRank:
        turned = self.side == "inputs"
        given = [low.transpose() for low in lows] if turned else list(lows)
        site = dataclasses.replace(changes, lows=given)
        merged = merge_site(self._way, site, weights, "aligned")
        assert isinstance(merged, LowRank)
        return (merged.transpose() if turned else merged) * self.scale


METHOD = MergeMethod(
    name="knots",
    title="KnOTS: entries of coordinates in a joint basis",
    paper="Stoica et al., 2024, arXiv 2410.19735",
    merge=Knots,
    whole={"options": {"density": 1.0}},
)
