"""Numbers that follow the depth of the model: a site's layer among those adapted, and its share.

value 5           5 5 5 5 5 5 5 5         in 8 adapted layers
value [2, 4]      2 2 2 2 4 4 4 4
"""

from __future__ import annotations

from collections.abc import Sequence

from plait.adapter import Site, block_index
from plait.errors import PlaitError

Layer = tuple[int, int]
"""(position from the lowest, number of adapted layers)."""


def layers_of(sites: Sequence[Site]) -> dict[str, Layer]:
    """{path: layer}; sites outside the blocks count with the last layer."""
    index = {s.path: block_index(s.path) for s in sites}
    order = {n: i for i, n in enumerate(sorted({n for n in index.values() if n is not None}))}
    layers = max(len(order), 1)
    return {
        path: (layers - 1 if block is None else order[block], layers)
        for path, block in index.items()
    }


def spread(name: str, value: int | Sequence[int], layer: Layer) -> int:
    """The number of option `name` at `layer`: a list is spread over equal groups of layers.

    Raises PlaitError where the list's length does not divide the number of layers.
    """
    position, layers = layer
    if isinstance(value, int):
        return value
    if not value or layers % len(value):
        raise PlaitError(
            f"{name} lists {len(value)} numbers, which do not divide the {layers} adapted layers "
            "into equal groups; give one number a layer, or a divisor of that many."
        )
    return value[position * len(value) // layers]
