"""Where a sparse spectrum has its coefficients, and how such an adapter stands in a PEFT folder.

The places are the first n of a permutation drawn from a seed that is an option: sites of one shape
have the same places, as in the papers, and PEFT finds them again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Delta, PeftCodec, PeftSite, Site
from plait.adapter.formats.peft_codec import any_transposed, one_value
from plait.errors import PlaitError


def places(site: Site, count: int, seed: int) -> Tensor:
    """`count` distinct positions in the flattened [out, in], in the order of their draw."""
    total = site.out_features * site.in_features
    if not 1 <= count <= total:
        raise PlaitError(f"{site.path!r} has {total} coefficients; it cannot train {count}.")
    return _draw(total, count, seed).clone()


@lru_cache(maxsize=32)
def _draw(total: int, count: int, seed: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].clone()


def spectrum_codec(
    kind: str,
    tensor: str,
    *,
    read: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {},
    write: Callable[[Mapping[str, Delta]], dict[str, Any]] = lambda deltas: {},
    settings: Sequence[str] = (),
) -> PeftCodec:
    """The codec of PEFT's type `kind`, which stores the coefficients as `tensor`.

    `read` gives the options beside coefficients, scaling and location_seed, `write` their keys and
    `settings` those keys' names.
    """

    def options(found: PeftSite) -> dict[str, Any]:
        stored, config = found.tensors.get(tensor), found.config
        return read(config) | {
            "coefficients": config["n_frequency"] if stored is None else len(stored),
            "scaling": float(config["scaling"]),
            "location_seed": config["random_loc_seed"],
        }

    def config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
        counts = {path: d.options.coefficients for path, d in deltas.items()}
        usual = Counter(counts.values()).most_common(1)[0][0]
        return write(deltas) | {
            "n_frequency": usual,
            "n_frequency_pattern": {p: n for p, n in counts.items() if n != usual},
            "scaling": one_value(deltas, "scaling"),
            "random_loc_seed": one_value(deltas, "location_seed"),
            "fan_in_fan_out": any_transposed(deltas),
        }

    own = ("n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", *settings)
    return PeftCodec(
        type=kind, keys={"spectrum": tensor}, options=options, config=config, settings=own
    )
