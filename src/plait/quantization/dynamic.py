"""The code book of 8-bit optimiser states: seven decades, finer the closer to the block's greatest.

    1 |················|········|····|··|·|·      half of the codes in [0.1, 1], a quarter in
      1               0.1     0.01  ...    1e-7   [0.01, 0.1], an eighth below, down to 1e-7, and 0

A moment's entries differ by many orders of magnitude within one block: equal steps would turn most
of them into 0. Each decade has equal steps of its own here, and its codes stand in their middles.
Dettmers et al., 2021, arXiv 2110.02861.
"""

from __future__ import annotations

from functools import cache

_WIDTH, _DECADES = 8, 7


@cache
def dynamic_codes(signed: bool = True) -> tuple[float, ...]:
    """256 codes, ascending: from -1 (not itself a code) to 1 if `signed`, else from 0 to 1."""
    most = 2 ** (_WIDTH - 2 if signed else _WIDTH - 1)
    levels = []
    for decade in range(_DECADES):
        count = most >> decade
        steps = [0.1 + 0.9 * (i + 0.5) / count for i in range(count)]
        levels += [step * 10.0**-decade for step in steps]
    mirrored = [-level for level in levels] if signed else []
    return tuple(sorted([*mirrored, 0.0, *levels, 1.0]))
