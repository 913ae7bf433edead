"""NuSlerp: slerp of the changes as they are, as a whole or for every row or column of its own.

    t = w_2 / (w_1 + w_2)      theta = angle between a = dW_1 and b = dW_2 (or two lines of them)
    dW = sin((1 - t) theta) / sin(theta) a + sin(t theta) / sin(theta) b

`slerp` with other defaults, under the name and in the form that mergekit's users know. The weights
are of any size, their ratio counts. Line by line each output (`rows`) or input (`columns`) turns by
its own angle; both are scalings of the factors' outer sides, so adapters merge exactly, without
being multiplied out. An output that both inputs move far apart is turned, one that only one of them
moves is scaled; a single angle for the whole matrix treats them alike. Lines that are (nearly)
parallel or opposite, or 0 in one input, are interpolated linearly.
Paper: Shoemake, 1985; mergekit, Goddard et al., 2024, arXiv 2403.13257.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plait.merging.method import MergeMethod
from plait.merging.methods.slerp import Slerp


@dataclass
class NuSlerp(Slerp):
    along: Literal["whole", "rows", "columns"] = "rows"
    """Turn each row (outputs; the default), each column (inputs), or each change as one vector."""
    norms: Literal["interpolated", "plain"] = "plain"
    """Interpolate the changes themselves, or directions and norms apart."""


METHOD = MergeMethod(
    name="nuslerp",
    title="NuSlerp: slerp line by line",
    paper="Shoemake, 1985; mergekit, Goddard et al., 2024, arXiv 2403.13257",
    merge=NuSlerp,
    inputs=2,
)
