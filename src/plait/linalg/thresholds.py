"""The k-th largest magnitude of a tensor, also of one that is only ever seen in blocks.

The bits of a non-negative float32 are ordered as the numbers are. A histogram of their upper half
says in which of 2^15 bins the k-th largest lies, a second one, of the lower half within that bin,
which number it is: two passes over the blocks, a few hundred kilobytes, and the exact answer that a
sort of everything would give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

_LOW = 16
_SAMPLE = 1 << 14
_CHUNK = 1 << 16
"""Entries that are looked at together: they stay in a cache from one step to the next."""
_BINS = 1 << 15
"""Of the upper half: the sign is always 0."""


def kth_magnitude(x: Tensor, count: int) -> float:
    """The magnitude of the count-th largest entry of a tensor in memory, in float32.

    A sample says between which two values it must lie; selecting among the few entries between them
    is several times quicker than selecting, sorting or counting bins over all. Where the sample
    misleads, all entries are selected from: the answer is exact either way.
    """
    import numpy as np

    entries = x.detach().to("cpu", torch.float32).flatten().numpy()
    if not 0 < count <= entries.size:
        raise ValueError(f"kth_magnitude: {count} of {entries.size} entries")
    low, high = _bracket(entries, count)
    above, found = 0, []
    for at in range(0, entries.size, _CHUNK):
        sizes = np.abs(entries[at : at + _CHUNK])
        larger = sizes >= high
        above += int(np.count_nonzero(larger))
        found.append(sizes[(sizes >= low) ^ larger])
    between = np.concatenate(found)
    if not above < count <= above + between.size:
        above, between = 0, np.abs(entries)
    place = between.size - (count - above)
    return float(np.partition(between, place)[place])


def _bracket(entries: np.ndarray, count: int) -> tuple[float, float]:
    """Two values that the count-th largest lies between, but for three samples in a thousand."""
    import numpy as np

    sample = np.sort(np.abs(entries[:: max(1, entries.size // _SAMPLE)]))
    share = 1 - count / entries.size
    spread = 3 * (sample.size * share * (1 - share)) ** 0.5 + 2
    first, last = int(share * sample.size - spread), int(share * sample.size + spread) + 1
    low = sample[first] if first >= 0 else 0.0
    return float(low), float(sample[last]) if last < sample.size else float("inf")


def kth_magnitudes(blocks: Callable[[], Iterable[Tensor]], counts: Sequence[int]) -> Tensor:
    """For each of k tensors the magnitude of its counts[i]-th largest entry, float32 [k].

    Args:
        blocks: starts a pass over blocks [k, ...]: the same entries of every tensor at a time, in
            float32 at most (wider dtypes are rounded).
        counts: how many entries are at least as large as the answer (more with ties); 0 gives
            infinity, the number of all entries gives the smallest magnitude.

    Two passes are made. Raises ValueError for a count above the number of entries.
    """
    wanted = torch.tensor(counts)
    upper = _histogram(blocks(), len(counts), None)
    if bool((wanted > upper.sum(1)).any()):
        raise ValueError(f"kth_magnitudes: {counts} of tensors of {int(upper[0].sum())} entries")
    bins, above = _bin_of(upper, wanted)
    lower = _histogram(blocks(), len(counts), bins)
    offset, _ = _bin_of(lower, wanted - above)
    bits = (bins << _LOW) | offset
    found = bits.to(torch.int32).view(torch.float32)
    return torch.where(wanted == 0, torch.inf, found)


def _histogram(blocks: Iterable[Tensor], k: int, within: Tensor | None) -> Tensor:
    """[k, bins] counts of the upper halves, or of the lower halves of those `within` a bin."""
    size = _BINS if within is None else 1 << _LOW
    counts = torch.zeros(k, size, dtype=torch.long)
    for block in blocks:
        for i, values in enumerate(block):
            bits = values.abs().to(torch.float32).contiguous().view(torch.int32).flatten()
            if within is None:
                halves = bits >> _LOW
            else:
                halves = bits[(bits >> _LOW) == int(within[i])] & ((1 << _LOW) - 1)
            counts[i] += torch.bincount(halves, minlength=size).cpu()
    return counts


def _bin_of(histogram: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(bin of the wanted-th from above, how many lie in higher bins) for each row."""
    from_above = histogram.flip(1).cumsum(1)
    place = (from_above < wanted[:, None]).sum(1).clamp_max(histogram.shape[1] - 1)
    before = torch.where(
        place > 0, from_above.gather(1, (place - 1).clamp_min(0)[:, None])[:, 0], 0
    )
    return histogram.shape[1] - 1 - place, before
