"""Compression: finished weights and adapters in fewer numbers, or in fewer bits.

`extract`: a full fine-tune as an adapter of its base. `squeeze`: an adapter at lower ranks.
"""

from plait.compression.extraction import extract
from plait.compression.squeezing import squeeze

__all__ = ["extract", "squeeze"]
