"""Compression: finished weights and adapters in fewer numbers, or in fewer bits.

`extract`: a full fine-tune as an adapter of its base.
"""

from plait.compression.extraction import extract

__all__ = ["extract"]
